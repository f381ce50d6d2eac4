"""The clip stage in miniature, and the committed CLIP."""

from pathlib import Path

import yaml

from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset
from dpdmd_pipeline.pipelines.clip import nodes
from dpdmd_pipeline.pipelines.clip.nodes import judge_clip, train_embedded_clip
from dpdmd_pipeline.pipelines.clip.options import ClipOptions

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "data/06_models/shapes_clip"
BASE = yaml.safe_load((ROOT / "conf/base/parameters_clip.yml").read_text())["clip"]


def test_the_stage_writes_a_folder_for_open_clip_and_reuses_its_training_the_next_time(tmp_path, caplog):
    caplog.set_level("INFO")
    options = ClipOptions(recipe={**BASE["recipe"], "steps": 2, "batch_size": 4, "checkpoint_every": 1})
    dataset = ModelFolderDataset(filepath=str(tmp_path / "shapes_clip"))
    dataset.save(train_embedded_clip(tmp_path / "state", options))
    retrieval = judge_clip(dataset.load())["retrieval"]
    assert 0 <= retrieval["full_captions"] < 0.1 and 0 <= retrieval["prompts"] < 0.5
    first = (tmp_path / "shapes_clip/open_clip_model.safetensors").read_bytes()
    assert "step 2 of 2" in caplog.text and "reused" not in caplog.text
    dataset.save(train_embedded_clip(tmp_path / "state", options))
    assert "reused" in caplog.text
    assert (tmp_path / "shapes_clip/open_clip_model.safetensors").read_bytes() == first


def test_changed_code_does_not_reuse_an_earlier_training(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    options = ClipOptions(recipe={**BASE["recipe"], "steps": 2, "batch_size": 4, "checkpoint_every": 1})
    train_embedded_clip(tmp_path / "state", options)(tmp_path / "one")
    monkeypatch.setattr(nodes, "code_hash", lambda *paths: "of another formula")
    train_embedded_clip(tmp_path / "state", options)(tmp_path / "two")
    assert "reused" not in caplog.text and len(list((tmp_path / "state").iterdir())) == 2


def test_the_committed_clip_finds_every_caption_and_is_small():
    judged = judge_clip(SHIPPED)
    retrieval = judged["retrieval"]
    assert judged["n"] == {"pictures": 864, "full_captions": 864, "prompts": 12}
    assert retrieval["full_captions"] > 0.98 and retrieval["prompts"] > 0.98
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) < 3e6
