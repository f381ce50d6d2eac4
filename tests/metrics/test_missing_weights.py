import pytest
import torch

from dpdmd_pipeline.metrics.presets import PRESETS, Settings, choose
from dpdmd_pipeline.metrics.weights import CLIP_SHAPES, DINO_V2, MissingWeightsError, hub_folder


def test_missing_weights_are_named_with_licence_size_and_command(tmp_path):
    folder = tmp_path / "dinov2-base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "preprocessor_config.json").touch()  # of an interrupted download
    with pytest.raises(MissingWeightsError) as told:
        DINO_V2.require(folder, "diversity.dino_v2")
    message = str(told.value)
    assert "\n" not in message and ": config.json" not in message
    for part in ("diversity.dino_v2", "facebook/dinov2-base", "Apache-2.0", "346 MB", "model.safetensors"):
        assert part in message
    assert f"hf download facebook/dinov2-base --local-dir {folder}" in message
    assert "preprocessor_config.json or processor_config.json" in message


def test_weights_that_are_there_are_found_whole_or_in_shards(tmp_path):
    folder = tmp_path / "dinov2-base"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        (folder / name).write_text("x")
    assert DINO_V2.require(folder, "") == folder


def test_weights_are_known_by_their_content_shards_included(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not of the model")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    (tmp_path / "1.safetensors").write_text("one")
    first = DINO_V2.digest(tmp_path)
    (tmp_path / "notes.txt").write_text("other")
    assert DINO_V2.digest(tmp_path) == first
    (tmp_path / "1.safetensors").write_text("two")
    second = DINO_V2.digest(tmp_path)
    (tmp_path / "1.safetensors").unlink()  # of a download that is not whole: the model will say so
    assert len({first, second, DINO_V2.digest(tmp_path)}) == 3


def test_weights_may_lie_elsewhere(tmp_path, passes):
    folder = tmp_path / "somewhere"
    elsewhere = {CLIP_SHAPES.folder: folder}
    settings = Settings(tmp_path, passes, processes=1, seed=0, elsewhere=elsewhere)
    assert settings.folder_of(CLIP_SHAPES) == folder and settings.folder_of(DINO_V2) == tmp_path / "dinov2-base"
    (preset,) = choose("diversity.clip_shapes")
    with pytest.raises(MissingWeightsError, match=f"not in {folder}; fetch with: kedro run --pipelines clip"):
        preset.make(settings)


def test_every_preset_that_needs_weights_says_so_before_it_loads_anything(tmp_path, settings):
    for preset in PRESETS:
        if preset.weights:
            with pytest.raises(MissingWeightsError, match=f"^{preset.full_name} needs .* MB.*; fetch with: "):
                preset.make(settings)


def test_an_axis_means_its_defaults_and_a_name_what_it_says():
    names = [preset.full_name for preset in choose("quality, diversity.dino_v3,quality")]
    assert names == ["diversity.dino_v3", "quality.arniqa"]
    assert len({preset.full_name for preset in PRESETS}) == len(PRESETS)
    with pytest.raises(ValueError, match="beauty is no metric: name axes .*diversity"):
        choose("beauty")
    with pytest.raises(ValueError, match="image_reward cannot live in this environment: its package pins timm"):
        choose("preference.image_reward")


def test_torch_hub_looks_elsewhere_only_for_a_while(tmp_path):
    before = torch.hub.get_dir()
    with pytest.raises(KeyError), hub_folder(tmp_path):
        assert torch.hub.get_dir() == str(tmp_path / "hub")
        raise KeyError
    assert torch.hub.get_dir() == before
