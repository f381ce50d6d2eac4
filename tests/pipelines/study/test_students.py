from pathlib import Path
from threading import Timer

import pytest
from tests.pipelines.conftest import PROMPTS, anchor_options, backbone_options, evaluate_options, train_options
from tests.test_dvc_sync import imported, module_file

from dpdmd_pipeline.pipelines.study import students
from dpdmd_pipeline.pipelines.study.nodes import run_study
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.publishing import Folders, locked

DMD = {"train": {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}}
OPTIONS = StudyOptions(seeds=[0, 1], baseline="dmd", runs={"dmd": DMD})


@pytest.fixture
def study(tiny_teacher, embeddings, anchors, tmp_path):
    """The study of DMD with two seeds, in one folder of states."""

    def run(**changes):
        groups = backbone_options(), anchor_options(), train_options(), evaluate_options(**changes)
        return run_study(PROMPTS, embeddings, anchors, tiny_teacher, tmp_path, *groups, OPTIONS)

    return run


def states(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def test_a_student_that_another_process_trains_is_taken_up_when_it_is_done_and_half_a_judgement_is_made_again(
    study, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(students, "_POLL", 0.05)
    alone = study()
    first = next(folder for folder in states(tmp_path) if list(folder.glob("step_*")))
    for record in tmp_path.glob("judged_*.json"):
        record.write_text(record.read_text()[:30])
    held = locked(Folders.of(first))
    held.__enter__()
    release = Timer(2, held.__exit__, (None, None, None))
    release.start()
    with caplog.at_level("INFO"):
        beside = study()
    release.join()
    assert beside == alone
    left = [line for line in caplog.messages if "is left to another process" in line]
    assert len(left) == 1 and f"{first} is being written by process" in left[0]
    assert caplog.messages.index(left[0]) < len(caplog.messages) - 1


def test_what_was_judged_is_neither_drawn_nor_trained_again_unless_it_is_asked_otherwise(study, tmp_path, monkeypatch):
    first = study()
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*")}
    drawn = []
    real = students.sample_model
    monkeypatch.setattr(students, "sample_model", lambda folder, *rest: drawn.append(folder) or real(folder, *rest))
    assert study() == first and drawn == [None]  # the teacher
    study(images_per_prompt=5)
    assert len(drawn) == 1 + 3
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("step_*")} == trained


def test_the_code_that_a_judgement_is_known_by_is_all_that_reads_the_pictures():
    package = Path(students.__file__).parents[2]
    todo, found = [package / "metrics/shapes.py"], set()
    while todo:
        path = todo.pop()
        found.add(path.relative_to(package).as_posix())
        todo += [file for name in imported(path) if (file := module_file(name))]
    assert len(found) > 5 and found - {"metrics/__init__.py", "shapes/__init__.py"} <= set(students.CODE)
