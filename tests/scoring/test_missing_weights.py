import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.raising import refuses

from dpdmd_pipeline.metrics.errors import MissingWeightsError, UnavailableError
from dpdmd_pipeline.metrics.libraries import hub_folder
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.presets import PRESETS, choose
from dpdmd_pipeline.scoring.published import CLIP_SHAPES, DINO_V2
from dpdmd_pipeline.scoring.weights import damage_of


def test_missing_weights_are_named_with_licence_size_and_command(tmp_path, passes):
    folder = tmp_path / "dinov2-base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "preprocessor_config.json").touch()  # from an interrupted download
    with pytest.raises(MissingWeightsError) as refused:
        choose("diversity.dino_v2")[0].require(Settings(tmp_path, passes, processes=1, seed=0))
    message = str(refused.value)
    assert "\n" not in message and ": config.json" not in message
    for part in ("diversity.dino_v2", "facebook/dinov2-base", "Apache-2.0", "346 MB", "model.safetensors"):
        assert part in message
    assert f"hf download facebook/dinov2-base --local-dir {folder}" in message
    assert "preprocessor_config.json" in message and " processor_config.json" in message


ALL_WEIGHTS = list(dict.fromkeys(weights for preset in PRESETS for weights in preset.weights))


@pytest.mark.parametrize("weights", ALL_WEIGHTS)
def test_a_command_works_for_a_folder_with_a_space(weights):
    words = shlex.split(weights.command(Path("/my weights/x")))
    assert bool(words) != bool(weights.stage)
    if "hf" in words[:1]:  # a word outside the options would be a file name, and `hf` would ignore the patterns
        options = {word: words[index + 1] for index, word in enumerate(words) if word.startswith("--")}
        files = [word for index, word in enumerate(words[3:], 3) if not {word, words[index - 1]} & options.keys()]
        assert options["--local-dir"] == "/my weights/x" and bool(files) != bool({"--include", "--exclude"} & {*words})
    elif "curl" in words:
        assert words[words.index("-o") + 1] == f"/my weights/x/{weights.files[0]}"


def test_weights_may_be_one_file_or_shards(tmp_path):
    folder = tmp_path / "dinov2-base"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json", "model.safetensors.index.json"):
        (folder / name).write_text("x")
    assert DINO_V2.lack(folder) == ""


def test_the_digest_depends_on_the_content_of_all_files_and_shards(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "notes.txt").write_text("not part of the model")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "1.safetensors"}}')
    (tmp_path / "1.safetensors").write_text("one")
    first = DINO_V2.digest(tmp_path)
    (tmp_path / "notes.txt").write_text("other")
    assert DINO_V2.digest(tmp_path) == first
    (tmp_path / "1.safetensors").write_text("two")
    second = DINO_V2.digest(tmp_path)
    (tmp_path / "1.safetensors").unlink()  # from an incomplete download: loading the model will fail
    assert len({first, second, DINO_V2.digest(tmp_path)}) == 3


def test_weights_may_have_another_folder(tmp_path, passes):
    folder = tmp_path / "somewhere"
    elsewhere = {CLIP_SHAPES.folder: folder}
    settings = Settings(tmp_path, passes, processes=1, seed=0, elsewhere=elsewhere)
    assert settings.folder_of(CLIP_SHAPES) == folder and settings.folder_of(DINO_V2) == tmp_path / "dinov2-base"
    (preset,) = choose("diversity.clip_shapes")
    with pytest.raises(MissingWeightsError, match=rf"{folder}; .*\bstage clip\b"):
        preset.make(settings)


def test_all_missing_weights_of_a_metric_are_named_at_once(settings):
    (preset,) = choose("quality.arniqa")
    with pytest.raises(MissingWeightsError) as refused:
        preset.require(settings)
    first, second = str(refused.value).split("; and ")
    assert first.startswith("quality.arniqa ") and "ARNIQA.pth" in first and "curl" in first
    assert "quality.arniqa" not in second and "regressor_koniq10k.pth" in second and "curl" in second
    assert "\n" not in str(refused.value)


def test_an_error_page_does_not_become_the_weights():
    assert all("curl -f" in weights.fetch for weights in ALL_WEIGHTS if "curl" in weights.fetch)


def test_the_clip_of_clip_iqa_is_one_of_its_weights():
    (preset,) = choose("quality.clipiqa_plus")
    files = {f"{weights.folder}/{weights.files[0]}" for weights in preset.weights}
    assert files == {"hub/pyiqa/CLIP-IQA%2B_learned_prompts-603f3273.pth", "hub/clip/RN50.pt"}


def write_good(folder):
    """Write a file of each kind with its own library."""
    net = torch.nn.Linear(3, 3)
    torch.save(net.state_dict(), folder / "a.pth")
    torch.save(net.state_dict(), folder / "old.pth", _use_new_zipfile_serialization=False)
    torch.jit.save(torch.jit.script(net), folder / "script.pt")
    save_file(net.state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])


def page(file):
    file.write_text("<html>404</html>")


def test_only_incomplete_and_foreign_files_count_as_damaged(tmp_path):
    for spoil in (cut, page):
        write_good(tmp_path)
        for file in sorted(tmp_path.iterdir()):
            assert damage_of(file) is None, file
            spoil(file)
            if file.name != "config.json" or spoil is page:
                assert damage_of(file), (file, spoil)


def test_a_checkpoint_with_a_changed_bit_is_damaged(tmp_path):
    torch.save({"weight": torch.arange(1000)}, tmp_path / "a.pth")
    content = bytearray((tmp_path / "a.pth").read_bytes())
    offset = content.index(torch.arange(1000).numpy().tobytes())
    content[offset + 80] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    assert damage_of(tmp_path / "a.pth")


def test_a_damaged_index_of_shards_has_a_digest(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    digests = set()
    for content in ("{", "[]", '{"weight_map": 1}', "{}"):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        digests.add(DINO_V2.digest(tmp_path))
    assert len(digests) == 4


def test_every_preset_names_its_missing_weights_before_it_loads_anything(tmp_path, settings):
    for preset in PRESETS:
        if preset.weights:
            first = preset.weights[0]
            with pytest.raises(MissingWeightsError, match=rf"^{preset.full_name} .* {first.size_mb} MB") as refused:
                preset.make(settings)
            assert first.remedy(settings.folder_of(first)) in str(refused.value)


def test_an_axis_stands_for_its_defaults_and_a_full_name_for_itself():
    names = [preset.full_name for preset in choose("quality, diversity.dino_v3,quality")]
    assert names == ["diversity.dino_v3", "quality.arniqa"]
    assert len({preset.full_name for preset in PRESETS}) == len(PRESETS)
    with refuses(ValueError, "beauty", "diversity, quality", "diversity.pixels"):
        choose("beauty")


@pytest.mark.parametrize(
    "name", ["preference.image_reward", "ImageReward", "HPSv3", "hps_v3", "GenEval", "t2v-metrics"]
)
def test_metrics_of_other_environments_are_refused_in_any_spelling(name):
    with pytest.raises(ValueError, match=f"^{name} .*(pins|needs)"):
        choose(name)


def test_torch_hub_gets_its_folder_back(tmp_path):
    before = torch.hub.get_dir()
    with pytest.raises(KeyError), hub_folder(tmp_path):
        assert torch.hub.get_dir() == str(tmp_path / "hub")
        raise KeyError
    assert torch.hub.get_dir() == before


def test_nothing_is_downloaded_while_a_model_is_built(tmp_path):
    import urllib.request

    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    before = torch.hub.urlopen, urllib.request.urlopen, constants.HF_HUB_OFFLINE
    address = "https://example.org/weights.pth"
    with hub_folder(tmp_path):
        with refuses(UnavailableError, address):
            torch.hub.load_state_dict_from_url(address)
        with refuses(UnavailableError, address):
            urllib.request.urlopen(address)
        with pytest.raises((LocalEntryNotFoundError, OfflineModeIsEnabled)):
            hf_hub_download("timm/resnet50.a1_in1k", "model.safetensors", cache_dir=tmp_path)
    assert (torch.hub.urlopen, urllib.request.urlopen, constants.HF_HUB_OFFLINE) == before
