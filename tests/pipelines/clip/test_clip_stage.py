"""The clip stage in miniature, and the CLIP that is shipped."""

from pathlib import Path

import yaml

from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset
from dpdmd_pipeline.pipelines.clip import nodes
from dpdmd_pipeline.pipelines.clip.nodes import judge_clip, train_embedded_clip
from dpdmd_pipeline.pipelines.clip.options import ClipOptions

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "data/06_models/shapes_clip"
BASE = yaml.safe_load((ROOT / "conf/base/parameters_clip.yml").read_text())["clip"]


def test_the_stage_writes_a_folder_that_open_clip_loads_and_finds_it_finished_the_next_time(tmp_path, caplog):
    caplog.set_level("INFO")
    options = ClipOptions(recipe={**BASE["recipe"], "steps": 2, "batch_size": 4, "checkpoint_every": 1})
    dataset = ModelFolderDataset(filepath=str(tmp_path / "shapes_clip"))
    dataset.save(train_embedded_clip(tmp_path / "state", options))
    found = judge_clip(dataset.load())
    assert 0 <= found["retrieval"]["full_captions"] < 0.1 and 0 <= found["retrieval"]["prompts"] < 0.5
    first = (tmp_path / "shapes_clip/open_clip_model.safetensors").read_bytes()
    assert "clip: step 2 of 2" in caplog.text and "reused" not in caplog.text
    dataset.save(train_embedded_clip(tmp_path / "state", options))
    assert "clip: reused, was finished" in caplog.text
    assert (tmp_path / "shapes_clip/open_clip_model.safetensors").read_bytes() == first


def test_other_code_does_not_take_up_what_this_code_trained(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    options = ClipOptions(recipe={**BASE["recipe"], "steps": 2, "batch_size": 4, "checkpoint_every": 1})
    train_embedded_clip(tmp_path / "state", options)(tmp_path / "one")
    monkeypatch.setattr(nodes, "code_hash", lambda *places: "of another formula")
    train_embedded_clip(tmp_path / "state", options)(tmp_path / "two")
    assert "reused" not in caplog.text and len(list((tmp_path / "state").iterdir())) == 2


def test_the_shipped_clip_finds_every_caption_and_is_small():
    judged = judge_clip(SHIPPED)
    found = judged["retrieval"]
    assert judged["n"] == {"pictures": 864, "full_captions": 864, "prompts": 12}
    assert found["full_captions"] > 0.98 and found["prompts"] > 0.98
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3e6
