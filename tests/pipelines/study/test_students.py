"""Several processes share the students; stored results are reused."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.pipelines.conftest import PROMPTS, anchor_options, backbone_options, evaluate_options, train_options

from dpdmd_pipeline.pipelines.study import students
from dpdmd_pipeline.pipelines.study.nodes import run_study
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.publishing import Folders, locked

DMD = {"train": {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}}
OPTIONS = StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": DMD})


@pytest.fixture
def study(tiny_teacher, embeddings, anchors, tmp_path):
    """Function that runs a study of DMD with two seeds in one state folder."""

    def run(**changes):
        groups = backbone_options(), anchor_options(), train_options(), evaluate_options(**changes)
        return run_study(PROMPTS, embeddings, anchors, tiny_teacher, tmp_path, *groups, OPTIONS)

    return run


def states(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_a_student_of_another_process_is_awaited_and_an_incomplete_result_is_made_again(
    study, tmp_path, monkeypatch, caplog
):
    alone = study()
    first = next(folder for folder in states(tmp_path) if list(folder.glob("step_*")))
    for record in tmp_path.glob("judged_*.json"):
        record.write_text(record.read_text()[:30])
    lock = ExitStack()
    lock.enter_context(locked(Folders.of(first)))
    monkeypatch.setattr(students, "time", SimpleNamespace(sleep=lambda seconds: lock.close()))
    with caplog.at_level("INFO"):
        shared = study()
    assert shared == alone
    (waiting,) = (line for line in caplog.messages if "another process" in line)  # once, not at every check
    assert str(first) in waiting and caplog.messages.index(waiting) < len(caplog.messages) - 1


def test_a_stored_result_is_reused_and_other_pictures_need_no_new_training(study, tmp_path, monkeypatch):
    first = study()
    checkpoints = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*")}
    folders = []
    real = students.sample_model
    monkeypatch.setattr(students, "sample_model", lambda folder, *rest: folders.append(folder) or real(folder, *rest))
    assert study() == first and folders == [None]  # the teacher
    study(images_per_prompt=5)
    assert len(folders) == 1 + 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*")} == checkpoints
