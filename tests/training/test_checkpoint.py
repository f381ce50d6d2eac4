import subprocess
import sys
import textwrap

import pytest
import torch

from dpdmd_pipeline.publishing import LockedError
from dpdmd_pipeline.training.checkpoint import Checkpoints


def state(value: float) -> dict:
    return {"weights": {"w": torch.full((3,), value)}, "history": [{"step": 1, "loss": value}]}


def test_the_newest_state_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, state(float(step)))
    step, newest = checkpoints.load_latest()
    assert step == 10
    torch.testing.assert_close(newest["weights"]["w"], torch.full((3,), 10.0))
    assert newest["history"] == [{"step": 1, "loss": 10.0}]


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
    step, before = checkpoints.load_latest()
    assert step == 1 and before["weights"]["w"][0] == 1
    assert "step_0000002" in caplog.text


KILLER = textwrap.dedent(
    """
    import os, signal, sys, time, torch
    from pathlib import Path
    from dpdmd_pipeline.training.checkpoint import Checkpoints
    checkpoints = Checkpoints(Path(sys.argv[1]))
    for delay in (0.05, 0.11, 0.17):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            for step in range(1, 100_000):
                checkpoints.save(step, {"w": torch.full((100_000,), float(step))})
                os.write(writer, b"%d\\n" % step)
        os.close(writer)
        first = os.read(reader, 100)  # a state is saved
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = (first + os.read(reader, 1_000_000)).split()
        step, state = checkpoints.load_latest()
        assert step >= int(saved[-1]), (step, saved[-1])
        assert (state["w"] == step).all()
    """
)


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    subprocess.run([sys.executable, "-c", KILLER, str(tmp_path)], check=True)


def test_two_processes_do_not_train_the_same_run(tmp_path):
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from dpdmd_pipeline.publishing import Folders, locked  # as Checkpoints.locked does, without loading torch
        with locked(Folders.of(Path(sys.argv[1]))):
            print("locked", flush=True)
            sys.stdin.read()
        """
    )
    run = Checkpoints(tmp_path / "run")
    command = [sys.executable, "-c", code, str(run.folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(LockedError, match=rf"\b{other.pid}\b"), run.locked():
            pass
        other.stdin.close()
        other.wait()
    with run.locked(), pytest.raises(LockedError), run.locked():
        pass
