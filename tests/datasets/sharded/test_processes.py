"""Several processes or machines write one cache as one process does."""

import logging
import os
import signal
import socket
import sys
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError
from tests.datasets.sharded.caches import (
    LOGGER,
    NUM_SHARDS,
    ROWS,
    contents,
    lazy_shards,
    make_shard,
    names_beside,
    save_counted,
    shards_of_two,
)
from tests.raising import refuses

from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, writing
from dpdmd_pipeline.training.machines import meet

PRELOADED = get_context("forkserver")  # loading torch is most of a process's time
PRELOADED.set_forkserver_preload(["torch.distributed.launcher.api"])  # not this package: tests/forked.py has the same


def note_and_make(folder: Path, number: int) -> dict[str, torch.Tensor]:
    (folder / f"{number} by {os.getpid()}").touch()
    return make_shard(number)


def refuse(message: str):
    raise ValueError(message)


def never_called(*_):
    raise AssertionError


def test_two_processes_share_the_shards_and_leave_the_bytes_of_one(tmp_path, dataset, folder, whole, caplog):
    (tmp_path / "notes").mkdir()
    thunks = {f"{number:05d}": partial(note_and_make, tmp_path / "notes", number) for number in range(NUM_SHARDS)}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger=LOGGER):
        dataset.save(shards_of_two(thunks))
    makers = dict(sorted(path.name.split(" by ") for path in (tmp_path / "notes").iterdir()))
    first, second, *others = makers.values()
    assert first != second and others == [first, second] * 2 and str(os.getpid()) not in (first, second)
    # an earlier test in this process may have let torchelastic's own lines through
    messages = [record.getMessage() for record in caplog.records if record.name.startswith(LOGGER)]
    for number, (message, rows) in enumerate(zip(messages, ROWS, strict=True), start=1):
        assert {"anchors:", str(number), "6", "written", f"({rows}"} < set(message.split())
    assert contents(folder) == whole
    assert names_beside(folder) == [".anchors.lock", "anchors"]


def test_a_whole_cache_starts_no_process(dataset, caplog):
    dataset.save(lazy_shards())
    data = lazy_shards()
    with caplog.at_level(logging.INFO, logger=LOGGER):
        dataset.save(LazyShards(data.shards, data.fingerprint, data.manifest, never_called))
    assert "reused" in caplog.messages[-1]


def test_an_error_of_one_process_is_raised_and_any_number_resumes_from_the_finished_shards(dataset, folder, whole):
    with pytest.raises(DatasetError) as caught:
        dataset.save(shards_of_two({"00003": partial(refuse, "no such prompt")}))
    assert type(caught.value.__cause__) is ValueError and str(caught.value.__cause__) == "no such prompt"
    assert not dataset.exists()
    assert save_counted(dataset) in ([2, 3, 4, 5], [3, 4, 5])  # the other may have finished its shard of that round
    assert contents(folder) == whole


def note_and_wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def write_until_a_signal(folder: Path, notes: Path, errors: Path) -> None:
    os.setsid()  # a group of its own, as of a terminal's command
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    for number in (signal.SIGINT, signal.SIGTERM):  # as hooks.py does for every run
        signal.signal(number, signal.default_int_handler)
    waiting = {name: partial(note_and_wait, notes) for name in ("00002", "00003")}
    try:
        ShardedDataset(filepath=str(folder)).save(shards_of_two(waiting))
    except KeyboardInterrupt:
        sys.exit(7)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_after_a_signal_no_process_is_running_and_the_same_command_resumes(tmp_path, dataset, folder, whole, number):
    notes, errors = tmp_path / "notes", tmp_path / "errors"
    notes.mkdir()
    writer = PRELOADED.Process(target=write_until_a_signal, args=(folder, notes, errors))
    writer.start()
    wait_until(lambda: len(list(notes.iterdir())) == 2 or not writer.is_alive())
    # a terminal's Ctrl-C goes to all of them
    os.killpg(writer.pid, number) if number == signal.SIGINT else os.kill(writer.pid, number)
    writer.join(60)
    assert writer.exitcode == (-number if number == signal.SIGKILL else 7), errors.read_text()
    assert not errors.read_text() or number == signal.SIGKILL  # multiprocessing reports its own cleanup after a kill
    wait_until(lambda: not any(Path("/proc", path.name).exists() for path in notes.iterdir()), seconds=10)
    assert save_counted(dataset) == [2, 3, 4, 5]
    assert contents(folder) == whole


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def save_on_a_machine(folder: Path, rendezvous: str) -> None:
    ShardedDataset(filepath=str(folder)).save(shards_of_two(machines=2, rendezvous=rendezvous))
    meet(rendezvous, 2).end()
    sys.exit(7)  # only the first machine returns from saving


def test_two_machines_write_one_cache_and_one_of_them_goes_on(folder, whole):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    machines = [PRELOADED.Process(target=save_on_a_machine, args=(folder, f"127.0.0.1:{port}")) for _ in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(120)
    assert sorted(machine.exitcode for machine in machines) == [0, 7]
    assert contents(folder) == whole


def test_a_file_of_another_machine_that_never_appears_is_named_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_VISIBLE_WITHIN", 0.2)
    with refuses(OSError, "00001.safetensors", "launch.machines=1"):
        writing._wait_until_visible(tmp_path / "00001.safetensors")
