"""Checkpoints survive kills and damage, and belong to one process at a time."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from dpdmd_pipeline.publishing import HeldError
from dpdmd_pipeline.training.checkpoint import Checkpoints


def state(value: float) -> dict:
    return {"weights": {"w": torch.full((3,), value)}, "history": [{"step": 1, "loss": value}]}


def test_the_newest_state_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, state(float(step)))
    step, saved = checkpoints.load_latest()
    assert step == 10
    torch.testing.assert_close(saved["weights"]["w"], torch.full((3,), 10.0))
    assert saved["history"] == [{"step": 1, "loss": 10.0}]


def test_only_the_last_few_states_stay_on_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        checkpoints.save(step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_0000004.json",
        "step_0000004.pt",
        "step_0000005.json",
        "step_0000005.pt",
    ]


def test_a_finished_run_keeps_its_last_state_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in range(1, 4):
        checkpoints.save(step, state(step), finished=step == 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_0000003.json", "step_0000003.pt"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped", "manifest"])
def test_a_damaged_state_is_skipped_for_the_one_before(tmp_path, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state(1.0))
    checkpoints.save(2, state(2.0))
    newest = tmp_path / "step_0000002.pt"
    content = bytearray(newest.read_bytes())
    if damage == "truncated":
        newest.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        newest.unlink()
    elif damage == "manifest":
        newest.with_suffix(".json").write_text('{"step": 2, "sh')
    else:
        content[len(content) // 2] ^= 1
        newest.write_bytes(content)
    step, saved = checkpoints.load_latest()
    assert step == 1 and saved["weights"]["w"][0] == 1
    assert "step_0000002" in caplog.text


def test_a_kill_at_any_moment_leaves_a_complete_state(tmp_path):
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from dpdmd_pipeline.training.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(Path(sys.argv[1]))\n"
        "for step in range(1, 100000):\n"
        "    checkpoints.save(step, {'w': torch.full((100_000,), float(step))})\n"
        "    print(step, flush=True)\n"
    )
    for delay in (0.05, 0.11, 0.17):
        process = subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        printed = process.communicate()[0].split()
        step, saved = Checkpoints(tmp_path).load_latest()
        assert step >= int(printed[-1] if printed else 1)
        assert (saved["w"] == step).all()


def test_two_processes_do_not_train_the_same_run(tmp_path):
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dpdmd_pipeline.training.checkpoint import Checkpoints\n"
        "with Checkpoints(Path(sys.argv[1]) / 'run').held():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, tmp_path]
    run = Checkpoints(tmp_path / "run")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(HeldError, match=str(other.pid)), run.held():
            pass
        other.stdin.close()
        other.wait()
    with run.held():
        pass
