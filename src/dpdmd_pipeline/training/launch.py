"""One run in many processes, on one machine or on several, by torch's elastic launcher.

The process that starts them does not train: it hears from rank 0 through a file, hands on the wish to stop, and tells
what went wrong in the words of the process that failed first. A run in one process needs nothing of this.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

log = logging.getLogger(__name__)

_STOPS = (signal.SIGINT, signal.SIGTERM)
_POLL = 0.1  # seconds
_PATIENCE = timedelta(hours=2)  # in an exchange: all processes wait while one writes a checkpoint
_MACHINES_PATIENCE = 900  # seconds until all machines must have come together
_MET = "met"  # a file that says that the processes have come together
_KILL_PATIENCE = 40  # seconds; the launcher itself waits 30 for processes that it ends


@dataclass(frozen=True)
class Launch:
    """How many processes, and where.

    Attributes:
        processes: on each machine.
        machines: that all run the same command.
        rendezvous: "host:port" of one of them, which all can reach; None on a single machine.
        run: name of what is run, the same on every machine.
        cuda: whether each process has a GPU of its own.
        share_cores: whether each process has its part of a machine's cores, or as many threads as one alone would
            have: then it computes what that one would, to the bit.
    """

    processes: int
    machines: int
    rendezvous: str | None
    run: str
    cuda: bool
    share_cores: bool = True


@dataclass(frozen=True)
class Member:
    """A process, as the work in it sees itself."""

    rank: int
    size: int  # of all processes, over all machines
    records: Path
    noted: list[int]  # signals that ask to stop

    def report(self, record: dict[str, Any]) -> None:
        """Tell the process that started all; only rank 0's word goes out."""
        if self.rank == 0:
            with self.records.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def asked_to_stop(self) -> bool:
        """Whether any process was; all must ask at the same place, and all get the same answer."""
        return bool(_sum_over_all(len(self.noted)))

    def wait_for_all(self) -> None:
        """Go on when all processes have come here."""
        _sum_over_all(0)

    def gather(self, value: Any) -> list[Any]:
        """What each process brings here, by rank; all get all of it, when the last has come."""
        values = [None] * self.size
        with _others_alive():
            dist.all_gather_object(values, value)
        return values

    def end_at_once(self) -> None:
        """From here on a signal that asks to stop ends the process: its work leaves nothing to be put in order."""
        for number in _STOPS:
            signal.signal(number, signal.SIG_DFL)
        for number in self.noted:
            os.kill(os.getpid(), number)


def _sum_over_all(number: int) -> int:
    """On the CPU, so that no GPU is waited for."""
    total = torch.tensor(number)
    with _others_alive():
        dist.all_reduce(total)
    return int(total)


class _EchoError(ChildProcessError):
    """What the user of a machine reads that has no failure of its own; the other's tells more."""


_ECHO = (
    "a process on another machine has ended, its own words say why; "
    "then run the same command on every machine again: finished work is kept"
)


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's: a connection is closed
        raise _EchoError(_ECHO) from error


Work = Callable[[Any, Member], bool]  # of a job that can be pickled; returns whether it was done to its end


def launched(work: Work, job: Any, launch: Launch) -> Iterator[dict[str, Any]]:
    """Run `work(job, member)` in every process; yields what rank 0 reports, as it comes.

    Closed early, it asks the processes to stop, and waits for them. None of them outlives it, nor this process.

    Raises:
        Exception: that of the process that failed first, its traceback attached as the cause.
        ChildProcessError: if a process was killed.
        KeyboardInterrupt: if the processes were asked to stop, and did.
        SystemExit: with 0 on a machine without rank 0, when its part is done.
        ValueError: if there are fewer GPUs than processes, or the machines do not come together.
    """
    before = set(multiprocessing.active_children())
    with _quiet_elastic(), _waiting(launch), tempfile.TemporaryDirectory(prefix="dpdmd-") as name:
        folder, running = Path(name), Future()
        # Not the main thread: that one hears signals, and hands on what is reported.
        Thread(target=_elastic, args=(running, work, job, launch, folder), daemon=True).start()
        try:
            yield from _records(folder / "records.jsonl", running)
            _conclude(running, folder, launch)
        except GeneratorExit:  # the processes end after their step, with a checkpoint
            _signal(signal.SIGTERM, before)
            wait([running])
            with suppress(KeyboardInterrupt, SystemExit):
                _conclude(running, folder, launch)
        finally:  # after a second signal, or a fault of ours
            if not running.done():
                _signal(signal.SIGKILL, before)
                wait([running], timeout=_KILL_PATIENCE)


def _elastic(running: Future, work: Work, job: Any, launch: Launch, folder: Path) -> None:
    """Start the processes and wait for them; `running` gets what each one on this machine returned, by its rank."""
    # Inherited by the processes: a signal that comes while they still load is noted, and kills none.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
    try:
        running.set_result(elastic_launch(_config(launch, folder), _enter)(work, job, launch, folder, os.getpid()))
    except BaseException as error:
        running.set_exception(error)


def _config(launch: Launch, folder: Path) -> LaunchConfig:
    rendezvous = launch.rendezvous or "127.0.0.1:0"
    return LaunchConfig(
        min_nodes=launch.machines,
        max_nodes=launch.machines,
        nproc_per_node=launch.processes,
        run_id=launch.run,
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous,
        rdzv_configs={"timeout": _MACHINES_PATIENCE},
        max_restarts=0,
        monitor_interval=_POLL,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        local_addr=_own_address(rendezvous),
    )


def _own_address(rendezvous: str) -> str:
    """Where other machines reach this one: its end of the way to the rendezvous. Nothing is sent.

    Raises:
        ValueError: if the rendezvous has no address.
    """
    host, port = rendezvous.rsplit(":", 1)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port) or 1))
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"launch.rendezvous={rendezvous}: {error.strerror}; give host:port of a machine") from error
    return host if own.startswith("127.") else own  # many a machine's own name leads to a loopback


@contextmanager
def _quiet_elastic() -> Iterator[None]:
    """The launcher logs failures, with tracebacks, that are told here in one line."""
    loggers = [logging.getLogger(f"torch.{name}") for name in ("distributed.elastic", "multiprocessing.spawn")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _waiting(launch: Launch) -> Iterator[None]:
    """Processes that have more threads than cores must not wait for each other in busy loops; they inherit this."""
    name = "OMP_WAIT_POLICY"
    if launch.share_cores or name in os.environ:
        yield
        return
    os.environ[name] = "PASSIVE"
    try:
        yield
    finally:
        del os.environ[name]


def _records(path: Path, running: Future) -> Iterator[dict[str, Any]]:
    """The lines of a growing file, until what writes them has ended."""
    read = 0
    while True:
        ended = running.done()
        content = path.read_bytes()[read:] if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        read += len(whole)
        yield from map(json.loads, whole.splitlines())
        if ended:
            return
        time.sleep(_POLL)


def _signal(number: signal.Signals, before: set[multiprocessing.process.BaseProcess]) -> None:
    for process in set(multiprocessing.active_children()) - before:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


# ---- how it ended


def _conclude(running: Future, folder: Path, launch: Launch) -> None:
    """Raise what is to be told of the processes' end, if anything."""
    try:
        finished = running.result()
    except ChildFailedError as error:
        raise _first_failure(error, folder, launch) from _RemoteError(_traceback(folder))
    except RendezvousError as error:
        if (folder / _MET).exists():  # it went with the machine that held it
            raise _EchoError(_ECHO) from error
        raise ValueError(
            f"{launch.machines} machines did not come together at {launch.rendezvous} ({error}): start the same "
            f"command on every one within {_MACHINES_PATIENCE // 60} minutes, with the same options"
        ) from error
    if not all(finished.values()):
        log.info("the processes have stopped between two steps, with a checkpoint: the same command goes on from there")
        raise KeyboardInterrupt
    if 0 not in finished:
        log.info("this machine's part is done: what comes of it is written by the machine that has the first process")
        raise SystemExit(0)


class _RemoteError(Exception):
    """Carries the traceback of another process, for the log file."""

    def __str__(self) -> str:
        return "\n" + self.args[0]


def _first_failure(error: ChildFailedError, folder: Path, launch: Launch) -> BaseException:
    """What the first process that failed says; the others only notice its end."""
    rank, failure = error.get_first_failure()
    if failure.exitcode in [-number for number in _STOPS]:  # where they are not noted
        return KeyboardInterrupt()
    notes = _notes(folder)
    # one that has told its error may still crash on its way out, where torch's threads outlive the interpreter
    untold = failure.exitcode < 0 and not any(note["rank"] == rank for note in notes)
    if untold or not notes:
        end = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        return ChildProcessError(
            f"process {rank} of {launch.processes * launch.machines} was ended by {end}; if memory ran out, lower "
            "launch.processes or the batch sizes; then run the same command again: finished work is kept"
        )
    return notes[0]["error"]


def _notes(folder: Path) -> list[dict[str, Any]]:
    """What failing processes of this machine left behind, the earliest first."""
    notes = [pickle.loads(path.read_bytes()) for path in folder.glob("error_*.pickle")]
    return sorted(notes, key=lambda note: note["time"])


def _traceback(folder: Path) -> str:
    return next((note["traceback"] for note in _notes(folder)), "")


# ---- in each process


def _enter(work: Work, job: Any, launch: Launch, folder: Path, parent: int) -> bool:
    """Join the others and do the work; returns whether it was done to its end."""
    rank = int(os.environ["RANK"])
    with _noted_signals() as noted:
        try:
            with _ended_with(parent):
                _join(launch)
            (folder / _MET).touch()
            member = Member(rank, int(os.environ["WORLD_SIZE"]), folder / "records.jsonl", noted)
            finished = work(job, member)
            member.wait_for_all()
            dist.destroy_process_group()
        except Exception as error:
            _leave_note(error, rank, folder / f"error_{rank}.pickle")
            raise
    if os.getppid() != parent:  # nobody waits for an answer
        sys.exit(1)
    return finished


@contextmanager
def _ended_with(parent: int) -> Iterator[None]:
    """End when the parent has: a process that has not met the others would wait for them for hours."""
    met = Event()

    def watch() -> None:
        while not met.wait(_POLL):
            if os.getppid() != parent:
                os._exit(1)

    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Signals that ask to stop are noted, so that all processes stop after the same step."""
    noted: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: noted.append(number)) for number in _STOPS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPS)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _join(launch: Launch) -> None:
    """Meet the other processes.

    Raises:
        ValueError: if there is no GPU for this one, or if others came than were asked for.
    """
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if size != launch.processes * launch.machines:
        raise ValueError(f"{size} processes came together, {launch.machines} times {launch.processes} were asked for")
    if launch.cuda:
        if torch.cuda.device_count() < launch.processes:
            raise ValueError(
                f"launch.processes={launch.processes} needs as many GPUs, there are {torch.cuda.device_count()}: "
                "lower it, or set device=cpu"
            )
        torch.cuda.set_device(local)
    if launch.share_cores:
        _share_cores(launch.processes)
    # torch's successor of that argument is not in older versions
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    backend = "cpu:gloo,cuda:nccl" if launch.cuda else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)


def _share_cores(processes: int) -> None:
    """Each process on a machine has its part of the cores, unless the user has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would warn
        torch.set_num_threads(threads)


def _leave_note(error: Exception, rank: int, path: Path) -> None:
    """Keep an error for the process that started this one.

    What is not a refusal may only be the echo of another process's end: it waits, so that the other is seen first.
    """
    told = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        told = RuntimeError(f"{type(error).__name__}: {error}")
    note = {"time": time.time(), "rank": rank, "error": told, "traceback": traceback.format_exc()}
    path.write_bytes(pickle.dumps(note))
    if isinstance(error, _EchoError) or not isinstance(error, ValueError | OSError):
        time.sleep(10 * _POLL)
