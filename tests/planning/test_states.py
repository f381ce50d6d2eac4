"""A new folder of checkpoints names the newest unfinished one that it does not continue."""

import json

import pytest

from dpdmd_pipeline.planning.identity import open_state

OPTIONS = {"vae": {"steps": 100, "learning_rate": 0.1}}


@pytest.fixture
def unfinished(tmp_path):
    """A state of a teacher, broken off in its second network."""
    folder = open_state(tmp_path, "a" * 64, "teacher", OPTIONS)
    for name in ("text_encoders/step_0000030", "vae/step_0000040"):
        (folder / name).mkdir(parents=True)
        (folder / name / "0.bin").write_bytes(bytes(3 << 20))
        (folder / name).with_suffix(".json").write_text("{}")
    return folder


def test_another_state_is_named_with_its_step_size_and_both_values(tmp_path, unfinished, caplog):
    open_state(tmp_path, "b" * 64, "teacher", {"vae": {**OPTIONS["vae"], "steps": 200}})
    (line,) = caplog.messages
    for fact in ("teacher: ", str(unfinished), "step 40", "6.0 MiB", "vae.steps=100, now 200"):
        assert fact in line
    assert "learning_rate" not in line and "\n" not in line


def test_the_run_that_continues_its_own_state_says_nothing(tmp_path, unfinished, caplog):
    assert open_state(tmp_path, "a" * 64, "teacher", OPTIONS) == unfinished and not caplog.messages


@pytest.mark.parametrize("record", ["{", "[]", json.dumps({"name": "clip", "last": None, "options": {}})])
def test_damaged_states_and_those_of_other_work_say_nothing(tmp_path, unfinished, caplog, record):
    (unfinished / "options.json").write_text(record)
    open_state(tmp_path, "b" * 64, "teacher", OPTIONS)
    assert not caplog.messages
