import resource
import shutil
import subprocess
import sys
import textwrap
from contextlib import contextmanager

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.publishing import LockedError
from dpdmd_pipeline.training.checkpoint import Checkpoints, Writer


def state(value: float) -> dict:
    weights = {"w": torch.full((3,), value), "empty": torch.ones(0, 2), "half": torch.ones(2).bfloat16()}
    return {"weights": weights, "history": [{"step": 1, "loss": value}], "count": torch.tensor(7), "none": {}}


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files_of(*steps):
    return {f"step_{step:07d}{name}" for step in steps for name in ("/0.bin", "/.metadata", ".json")}


def test_the_newest_state_comes_back_as_it_was(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.load_latest() is None
    for step in (1, 2, 10):
        checkpoints.save(step, state(float(step)))
    step, newest = checkpoints.load_latest()
    assert step == 10
    torch.testing.assert_close(newest, state(10.0), rtol=0, atol=0)


def test_only_the_last_few_states_stay_on_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    for step in range(1, 6):
        checkpoints.save(step, state(step))
    assert files(tmp_path) == files_of(4, 5)


def test_a_finished_run_keeps_its_last_state_alone(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=3)
    for step in range(1, 4):
        checkpoints.save(step, state(step), finished=step == 3)
    assert files(tmp_path) == files_of(3)


def flip(path, position=0.5):
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", sorted(files_of(2)))
@pytest.mark.parametrize("damage", ["truncated", "missing", "flipped"])
def test_a_damaged_state_is_named_and_skipped_for_the_one_before(tmp_path, file, damage, caplog):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"weights": {"w": torch.full((300,), float(step))}})
    path = tmp_path / file
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif damage == "missing":
        path.unlink()
    else:
        flip(path)
    step, before = checkpoints.load_latest()
    assert step == 1 and (before["weights"]["w"] == 1).all()
    assert "step_0000002" in caplog.text or (damage, path.suffix) == ("missing", ".json")  # then it is incomplete


def test_no_flipped_byte_is_ever_loaded(tmp_path, caplog):
    whole = Checkpoints(tmp_path / "whole")
    whole.save(2, state(2.0))
    for file in files_of(2):
        for number in range(8):
            copy = Checkpoints(shutil.copytree(whole.folder, tmp_path / f"{file.replace('/', '_')}{number}"))
            flip(copy.folder / file, number / 8)
            with refuses(OSError, str(copy.folder), "all 1 checkpoints", "delete"):
                copy.load_latest()


# ---- a full disk


@contextmanager
def files_of_at_most(size):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("background", [False, True], ids=["waiting", "background"])
def test_a_full_disk_in_the_middle_of_a_state_is_one_line_and_leaves_the_one_before(tmp_path, background):
    writer = Writer(Checkpoints(tmp_path), background, group=None, writes=True)
    writer.save(1, state(1.0), finished=False, last=False)
    writer.wait()
    large = {"weights": {"w": torch.zeros(1_000_000)}}
    with files_of_at_most(1_000_000), refuses(OSError, str(tmp_path / "step_0000002"), "file size limit") as error:
        writer.save(2, large, finished=False, last=False)
        writer.wait()
    assert "\n" not in str(error.value)
    assert files(tmp_path) == files_of(1) and not writer.failed()
    writer.save(2, large, finished=False, last=False)  # after a remedy
    writer.wait()
    assert Checkpoints(tmp_path).latest() == 2


def test_a_state_is_written_as_it_was_when_its_write_began(tmp_path):
    """On a CPU a state's tensors are the network's own, which change while the state is written."""
    writer, weights = Writer(Checkpoints(tmp_path), True, group=None, writes=True), torch.zeros(10_000_000)
    writer.save(1, {"w": weights}, finished=False, last=False)
    weights += 1
    writer.wait()
    assert not Checkpoints(tmp_path).load_latest()[1]["w"].any()


# ---- kills


KILLER = textwrap.dedent(
    """
    import os, signal, sys, time, torch
    from pathlib import Path
    from dpdmd_pipeline.training.checkpoint import Checkpoints, Writer
    checkpoints = Checkpoints(Path(sys.argv[1]))
    for delay, background in ((0.05, False), (0.11, True), (0.17, False), (0.23, True)):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            states = Writer(checkpoints, background, group=None, writes=True)
            for step in range(1 + checkpoints.latest(), 100_000):
                states.save(step, {"w": torch.full((100_000,), float(step))}, finished=False, last=False)
                if step > 1:
                    os.write(writer, b"%d\\n" % (step - background))
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
