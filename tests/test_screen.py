"""Screen of a run: its bar and what else it shows."""

import logging
import time

import pytest
import rich

from dpdmd_pipeline.screen import Screen, duration


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 0.0)
    screen = Screen()
    with screen.open("title", is_verbose=False):
        yield screen


def advance(screen, monkeypatch, steps, total, stage=""):
    """Advance a training by steps of one second."""
    begin = time.monotonic()
    with screen.bar("DMD", total, stage) as tell:
        for number, step in enumerate(steps, 1):
            monkeypatch.setattr(time, "monotonic", lambda now=begin + number: now)
            tell(step, "loss 1")


def test_a_file_gets_the_first_step_and_the_quarters_of_a_training(screen, monkeypatch, capsys):
    advance(screen, monkeypatch, range(31, 101), 100)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["31/100,", "50/100,", "75/100,", "100/100,"]
    assert lines[0].endswith("DMD 31/100, 1:09 min left; loss 1") and "0 s left" in lines[-1]


def test_the_time_left_is_that_of_the_whole_run_by_its_passes(screen, monkeypatch, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    passes = {"anchors": 50, "train_dmd": 100, "train": 100, "evaluate": 30}
    logging.getLogger("dpdmd_pipeline.planning.stages").debug("costs", extra={"passes": passes})
    del screen._passes["anchors"]  # a stage that has ended
    advance(screen, monkeypatch, [1], 10, "train_dmd")  # 10 passes in a second: 90 + 100 + 30 are left
    advance(screen, monkeypatch, [1], 10, "train")
    assert [line.split(", ")[1] for line in capsys.readouterr().out.splitlines()] == [
        "22 s left; loss 1",
        "12 s left; loss 1",
    ]


def test_only_lines_about_the_run_are_shown(screen, capsys, caplog):
    caplog.set_level(logging.DEBUG)
    for name in ("planning.gpu", "datasets.sharded.writing", "training.machines"):
        logging.getLogger(f"dpdmd_pipeline.{name}").info("a line of %s", name)
    shown = capsys.readouterr().out
    assert "planning.gpu" in shown and "training.machines" in shown and "writing" not in shown


def test_results_come_after_everything_else(capsys):
    screen = Screen()
    with screen.open("title", is_verbose=False):
        screen.at_end("results")
        screen.show("a stage")
    assert capsys.readouterr().out.splitlines() == ["title", "a stage", "results"]


def test_a_terminal_of_80_columns_shows_step_time_and_facts_in_one_line(monkeypatch, capsys):
    console = rich.get_console()
    monkeypatch.setattr(console, "_width", 80)
    monkeypatch.setenv("COLUMNS", "80")
    screen = Screen()
    with screen.open("title", is_verbose=False), screen.bar("DP-DMD", 100) as tell:
        tell(62, "diversity 100 % of the teacher's")
        monkeypatch.setattr(console, "_force_terminal", True)
        console.print(screen._progress.get_renderable())
    line = capsys.readouterr().out.splitlines()[-1]
    assert "62/100" in line and "s left" in line and "of the teacher's" in line and len(line) <= 80


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0 s"), (59.4, "59 s"), (60, "1:00 min"), (3599, "59:59 min"), (7260, "2:01 h")]
)
def test_durations_are_short(seconds, text):
    assert duration(seconds) == text
