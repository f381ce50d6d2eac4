"""Pictures that are kept and tracked while a student trains."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.raising import refuses
from tests.training.conftest import WATCHED
from tests.training.test_watch import weights

from dpdmd_pipeline.planning import checks
from dpdmd_pipeline.training.preview import SIZE, decode_row, preview_path
from dpdmd_pipeline.training.tracking import tracked

WATCH = {**WATCHED["watch"], "every": 1}


def rows(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in folder.glob("previews/*.png")}


def test_a_row_for_each_measurement_and_one_of_the_teacher_first(start, backbone, tmp_path):
    _, records = start(tmp_path, {"previews": 1}, watch=WATCH)
    cycles = [record["step"] for record in records]
    pictures = rows(tmp_path)
    assert sorted(map(int, pictures)) == [0, *cycles]
    assert {picture.shape for picture in pictures.values()} == {(32, 32 * WATCH["images_per_prompt"], 3)}
    teacher, *students = (pictures[name] for name in sorted(pictures))
    assert all(not np.array_equal(teacher, student) for student in students)


def test_pictures_do_not_change_the_student(start, tmp_path):
    plain, records = start(tmp_path / "plain", watch=WATCH)
    losses = list(records)
    shown, records = start(tmp_path / "shown", {"previews": 2}, watch=WATCH)
    assert list(records) == losses and torch.equal(weights(plain), weights(shown))
    assert not rows(tmp_path / "plain") and rows(tmp_path / "shown")


def test_large_pictures_are_kept_small(tmp_path):
    class Backbone:
        def decode(self, latents):
            return torch.full((len(latents), 3, 4 * SIZE, 2 * SIZE), 0.5)

    row = decode_row(Backbone(), torch.zeros(2, 3, 4, 8, 8))
    assert row.shape == (2 * SIZE, 6 * SIZE, 3) and bool((row == 128).all())
    assert preview_path(tmp_path, 7).parent.name == "previews"


@pytest.mark.parametrize("every, previews", [(0, 2), (1, 0)])
def test_without_a_watch_or_previews_no_picture_is_kept(start, tmp_path, every, previews):
    list(start(tmp_path, {"previews": previews}, watch={**WATCH, "every": every})[1])
    assert not (tmp_path / "previews").exists()


# ---- trackers


def test_a_tracker_gets_every_loss_and_the_pictures(start, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = SimpleNamespace(track=["tensorboard"], model_dump=lambda mode: {"student": {"rate": 0.1}, "grid": [1]})
    _, records = start(tmp_path, {"previews": 1}, watch=WATCH)
    with tracked("DP-DMD", tmp_path, options) as track:
        history = []
        for record in records:
            track(record)
            history.append(record)
    (folder,) = (tmp_path / "tracking").iterdir()
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    logged = {event.step: event.value for event in events.Scalars("dmd_loss")}
    assert logged == pytest.approx({record["step"]: record["dmd_loss"] for record in history})
    pictures = events.Images("previews")
    assert [picture.step for picture in pictures] == [record["step"] for record in history]
    assert (pictures[0].width, pictures[0].height) == (32 * WATCH["images_per_prompt"], 32)


def test_without_trackers_nothing_is_written(tmp_path):
    with tracked("DMD", tmp_path, SimpleNamespace(track=[])) as track:
        track({"step": 1, "dmd_loss": 0.5})
    assert not any(tmp_path.iterdir())


def test_a_tracker_that_is_missing_or_has_no_login_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with refuses(ValueError, "mlflow", "pip install mlflow"):
        checks.check_trackers(SimpleNamespace(track=["mlflow"]))
    monkeypatch.setattr(checks, "find_spec", lambda name: object())
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb = SimpleNamespace(track=["wandb"])
    with refuses(ValueError, "wandb login", "WANDB_MODE=offline"):
        checks.check_trackers(wandb)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    checks.check_trackers(wandb)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_MODE", "offline")
    checks.check_trackers(wandb)
