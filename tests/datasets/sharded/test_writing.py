"""Caches are reused, replaced and resumed after a kill at any moment."""

import logging
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from kedro.io import DatasetError
from tests.datasets.sharded.caches import (
    LOGGER,
    NUM_SHARDS,
    ROOT,
    contents,
    lazy_shards,
    names_beside,
    save_counted,
    truncate,
)

from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
from dpdmd_pipeline.publishing import Folders, LockedError


def test_a_whole_cache_is_reused_without_calling_a_thunk(dataset, folder, caplog):
    dataset.save(lazy_shards())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    caplog.clear()  # Kedro, if it was imported before, lets this package's lines through at any level
    with caplog.at_level(logging.INFO, logger=LOGGER):
        assert save_counted(dataset) == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    (message,) = [record.getMessage() for record in caplog.records if record.name.startswith(LOGGER)]
    assert {"anchors:", "reused"} < set(message.split()) and str(NUM_SHARDS) in message


@pytest.mark.parametrize("other", [{"seed": 1}, {"names": [f"x{number}" for number in range(NUM_SHARDS)]}], ids=str)
def test_another_fingerprint_or_other_shards_replace_the_cache_and_leave_nothing_behind(dataset, folder, other):
    dataset.save(lazy_shards())
    assert save_counted(dataset, **other) == list(range(NUM_SHARDS))
    assert dataset.load().manifest == {"seed": other.get("seed", 0)}
    assert names_beside(folder) == [".anchors.lock", "anchors"]
    assert len(list(folder.iterdir())) == NUM_SHARDS + 1


def test_a_replaced_cache_is_named_with_its_shards_its_size_and_both_values(dataset, folder, caplog):
    dataset.save(lazy_shards())
    caplog.clear()
    save_counted(dataset, seed=1)
    line = caplog.messages[0]
    assert all(fact in line for fact in (str(folder), f"{NUM_SHARDS} shards", "MiB", "seed=0, now 1"))
    caplog.clear()
    dataset.save(replace(lazy_shards(1), fingerprint="other code"))
    assert str(folder) in caplog.messages[0] and caplog.messages[0].endswith("code")


def test_an_unfinished_cache_that_is_not_continued_is_named(dataset, folder, caplog):
    interrupted = lazy_shards()
    interrupted.shards["00002"] = fail
    with pytest.raises(DatasetError):
        dataset.save(interrupted)
    caplog.clear()
    save_counted(dataset)
    assert not any("seed" in line for line in caplog.messages)
    shutil.rmtree(folder)
    with pytest.raises(DatasetError):
        dataset.save(interrupted)
    caplog.clear()
    save_counted(dataset, seed=1)
    assert all(fact in caplog.messages[0] for fact in (".anchors.partial", "2 shards", "seed=0, now 1"))
    with pytest.raises(DatasetError):
        dataset.save(interrupted)
    caplog.clear()
    assert save_counted(dataset, seed=1) == []  # the published one is reused, and the unfinished one stays
    assert not any("anew" in line for line in caplog.messages)


def fail() -> None:
    raise ValueError("a thunk failed")


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    link = tmp_path / "anchors"
    link.symlink_to(tmp_path / "big_disk" / "anchors")
    dataset = ShardedDataset(filepath=str(link))
    for seed in (0, 1):
        dataset.save(lazy_shards(seed))
        assert dataset.load().manifest == {"seed": seed}
    assert link.is_symlink()


# ---- interruptions


def write_until(dataset: ShardedDataset, number: int) -> None:
    """Write the cache with a thunk that fails at shard `number`."""
    data = lazy_shards()
    with pytest.raises(DatasetError) as caught:
        shards = dict(data.shards) | {f"{number:05d}": lambda: 1 / 0}
        dataset.save(LazyShards(shards, data.fingerprint, data.manifest))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import safetensors.torch
    from tests.datasets.sharded.caches import lazy_shards
    from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
    dataset, data = ShardedDataset(filepath=sys.argv[1]), lazy_shards()

    def run_and_kill(stop_at, delay):
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            def call(number, thunk):
                if number == stop_at:
                    os.write(there, b"here")
                    time.sleep(60)
                return thunk()
            shards = {
                name: lambda number=number, thunk=thunk: call(number, thunk)
                for number, (name, thunk) in enumerate(data.shards.items())
            }
            if stop_at is None:
                os.write(there, b"here")
            dataset.save(LazyShards(shards, data.fingerprint, data.manifest))
            os._exit(0)
        os.read(here, 4)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    if sys.argv[3] == "shards":
        for stop_at in range(len(data.shards)):
            run_and_kill(stop_at, 0)
            finished = len(list(Path(sys.argv[1]).with_name(".anchors.partial").glob("*.safetensors")))
            assert (finished, dataset.exists()) == (stop_at, False), (finished, stop_at)
    else:
        start = time.perf_counter()
        ShardedDataset(filepath=sys.argv[1] + "_uninterrupted").save(data)
        duration = time.perf_counter() - start
        for _ in range(12):
            run_and_kill(None, random.uniform(0, 4 * duration))
    """
)


def kill_writers(folder: Path, moments: str) -> None:
    """Start the same writer again and again, each killed with SIGKILL."""
    subprocess.run([sys.executable, "-c", KILLER, str(folder), ROOT, moments], check=True)


def test_killed_at_every_shard_the_same_command_continues_to_the_same_bytes(dataset, folder, whole):
    kill_writers(folder, "shards")  # each gets one shard further than the one before
    assert save_counted(dataset) == [NUM_SHARDS - 1]
    assert contents(folder) == whole


def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(dataset, folder, whole):
    kill_writers(folder, "random moments")
    dataset.save(lazy_shards())
    assert contents(folder) == whole
    assert not any(path.exists() for path in (Folders.of(folder).partial, Folders.of(folder).ready))


class Killed(BaseException):
    pass


def interrupt_at(moment: int, monkeypatch) -> None:
    """Let the process die (an exception nothing catches) at the n-th change of the disk."""
    remaining = iter(range(moment, -1, -1))

    def counted(change):
        def call(*arguments, **options):
            if next(remaining) == 0:
                raise Killed
            return change(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("before", [None, "another cache", "damaged"])
def test_killed_between_any_two_changes_of_the_disk_a_whole_cache_can_be_had(
    dataset, folder, whole, before, monkeypatch
):
    changes = 0
    while True:
        if before:
            dataset.save(lazy_shards(seed=1 if before == "another cache" else 0))
        if before == "damaged":
            truncate(folder / "00002.safetensors")
        with monkeypatch.context() as patch:
            interrupt_at(changes, patch)
            try:
                dataset.save(lazy_shards())
                break
            except Killed:
                pass
        if before == "another cache":
            assert dataset.load().manifest["seed"] in (0, 1)  # one of the two can always be loaded
        dataset.save(lazy_shards())
        assert contents(folder) == whole
        assert names_beside(folder) == [".anchors.lock", "anchors"]
        shutil.rmtree(folder)
        changes += 1
    assert changes >= (4 if before == "damaged" else NUM_SHARDS + 2)


def test_a_cache_killed_while_published_is_recovered_by_loading(dataset, folder):
    dataset.save(lazy_shards())
    folder.rename(Folders.of(folder).ready)
    Folders.of(folder).old.mkdir()
    assert dataset.exists()
    assert dataset.load().manifest == {"seed": 0}
    assert names_beside(folder) == [".anchors.lock", "anchors"]


def test_shards_of_another_fingerprint_are_not_reused(dataset, folder, whole):
    write_until(dataset, 3)
    (Folders.of(folder).partial / "00007.safetensors.tmp").write_bytes(b"half a shard")
    assert save_counted(dataset, seed=1) == list(range(NUM_SHARDS))
    assert not Folders.of(folder).partial.exists()
    assert set(contents(folder)) == set(whole)


def test_a_truncated_shard_of_an_unfinished_cache_is_written_again(dataset, folder, whole):
    write_until(dataset, 4)
    truncate(Folders.of(folder).partial / "00001.safetensors")
    assert save_counted(dataset) == [1, 4, 5]
    assert contents(folder) == whole


def test_a_failing_thunk_keeps_the_shards_before_it(dataset):
    write_until(dataset, 3)
    assert save_counted(dataset) == [3, 4, 5]


def test_progress_is_logged_shard_by_shard(dataset, caplog):
    write_until(dataset, 1)
    caplog.clear()  # Kedro, if it was imported before, lets this package's lines through at any level
    with caplog.at_level(logging.INFO, logger=LOGGER):
        dataset.save(lazy_shards())
    first, second = (message.split() for message in caplog.messages[:2])
    assert {"anchors:", "1", "6", "kept", "(4"} < set(first)
    assert {"anchors:", "2", "6", "written", "(1"} < set(second)


# ---- other processes, full disks


def test_a_second_writer_is_refused_with_the_id_of_the_first(dataset, folder, whole):
    code = textwrap.dedent(
        """
        import sys, time
        from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
        def wait():
            print("here", flush=True)
            time.sleep(60)
        ShardedDataset(filepath=sys.argv[1]).save(LazyShards({"a": wait}, "f", {}))
        """
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(DatasetError, match=rf"{folder} .*\b{process.pid}\b") as error:
            dataset.save(lazy_shards())
        assert isinstance(error.value.__cause__, LockedError)
        process.kill()
    dataset.save(lazy_shards())
    assert contents(folder) == whole


def test_a_file_too_big_for_the_disk_names_path_and_remedy_and_keeps_finished_shards(folder):
    code = textwrap.dedent(
        """
        import resource, sys, torch
        from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        shards = {"a": lambda: {"x": torch.zeros(100)}, "b": lambda: {"x": torch.zeros(100_000)}}
        try:
            ShardedDataset(filepath=sys.argv[1]).save(LazyShards(shards, "f", {}))
        except Exception as error:
            print(type(error.__cause__).__name__, error.__cause__, sep="|")
        """
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    kind, text = result.stdout.strip().split("|")
    assert kind == "OSError"
    assert "File too large" in text and "file size limit" in text
    assert str(Folders.of(folder).partial / "b.safetensors") in text
    assert {path.name for path in Folders.of(folder).partial.iterdir()} == {"a.safetensors", "manifest.json"}
