"""One of many processes: its view of the others, how it joins them, and the note that it leaves when it fails."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from threading import Event, Thread
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
POLL = 0.1  # seconds
MET = "met"  # file that exists once the processes have met
RECORDS = "records.jsonl"  # file of the reports of rank 0
_EXCHANGE_TIMEOUT = timedelta(hours=2)  # all processes wait while one writes a checkpoint


@dataclass(frozen=True)
class Launch:
    """Number of processes, and where they run.

    Attributes:
        processes: on each machine.
        machines: number of machines, which all run the same command.
        rendezvous: "host:port" of one machine that all can reach; None on a single machine.
        run: name of the run, the same on every machine.
        cuda: True if each process has a GPU of its own.
        share_cores: True divides a machine's cores among its processes. False gives each the threads of a single
            process, so it computes the same to the bit.
    """

    processes: int
    machines: int
    rendezvous: str | None
    run: str
    cuda: bool
    share_cores: bool = True


@dataclass(frozen=True)
class Member:
    """A process, as seen by the work in it.

    Attributes:
        size: number of processes on all machines.
        records: file of the reports of rank 0.
        signals: received signals that ask to stop.
    """

    rank: int
    size: int
    records: Path
    signals: list[int]

    def report(self, record: dict[str, Any]) -> None:
        """Send a record to the process that started all; ranks other than 0 send nothing."""
        if self.rank == 0:
            with self.records.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def asked_to_stop(self) -> bool:
        """True if any process received a signal to stop. All must call this together, and get the same answer."""
        return bool(_sum_over_all(len(self.signals)))

    def wait_for_all(self) -> None:
        """Wait until all processes have come here."""
        _sum_over_all(0)

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, by rank; every process gets them all."""
        values = [None] * self.size
        with _others_alive():
            dist.all_gather_object(values, value)
        return values

    def end_at_once(self) -> None:
        """Let signals end the process from now on: its work needs no cleanup."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for number in self.signals:
            os.kill(os.getpid(), number)


Work = Callable[[Any, Member], bool]  # of a job that can be pickled; returns True if it was done to its end


def enter(work: Work, job: Any, launch: Launch, folder: Path, parent: int) -> bool:
    """Join the other processes and do the work; returns True if it was done to its end."""
    rank = int(os.environ["RANK"])
    with _recorded_signals() as signals:
        try:
            with _ended_with(parent):
                _join(launch)
            (folder / MET).touch()
            member = Member(rank, int(os.environ["WORLD_SIZE"]), folder / RECORDS, signals)
            finished = work(job, member)
            member.wait_for_all()
            dist.destroy_process_group()
        except Exception as error:
            _leave_note(error, rank, folder / f"error_{rank}.pickle")
            raise
    if os.getppid() != parent:  # nobody waits for an answer
        sys.exit(1)
    return finished


def _join(launch: Launch) -> None:
    """Meet the other processes.

    Raises:
        ValueError: if there are fewer GPUs than processes, or another number of processes than expected.
    """
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    if size != launch.processes * launch.machines:
        raise ValueError(f"{size} processes have met, {launch.machines} times {launch.processes} were expected")
    if launch.cuda:
        if torch.cuda.device_count() < launch.processes:
            raise ValueError(
                f"launch.processes={launch.processes} needs as many GPUs, there are {torch.cuda.device_count()}: "
                "lower it, or set device=cpu"
            )
        torch.cuda.set_device(local)
    if launch.share_cores:
        _share_cores(launch.processes)
    # Older versions of torch lack the successor of that argument
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    backend = "cpu:gloo,cuda:nccl" if launch.cuda else "gloo"
    dist.init_process_group(backend, timeout=_EXCHANGE_TIMEOUT)


def _share_cores(processes: int) -> None:
    """Divide a machine's cores among its processes, unless the user has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would warn
        torch.set_num_threads(threads)


@contextmanager
def _ended_with(parent: int) -> Iterator[None]:
    """End when the parent has ended: a process that waits to meet the others would wait for hours."""
    met = Event()

    def watch() -> None:
        while not met.wait(POLL):
            if os.getppid() != parent:
                os._exit(1)

    Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        met.set()


@contextmanager
def _recorded_signals() -> Iterator[list[int]]:
    """Record the signals that ask to stop, so that all processes stop after the same step."""
    signals: list[int] = []
    before = {number: signal.signal(number, lambda number, _frame: signals.append(number)) for number in STOP_SIGNALS}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- failures


class OtherMachineError(ChildProcessError):
    """A process on another machine has failed; the message there tells more."""


def other_machine_failed() -> OtherMachineError:
    """The error for the user of a machine without a failure of its own."""
    return OtherMachineError(
        "a process on another machine has ended: read the error there, then run the same command on every machine "
        "again; finished work is kept"
    )


@contextmanager
def _others_alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo: a connection is closed
        raise other_machine_failed() from error


def _sum_over_all(number: int) -> int:
    """Sum over all processes, on the CPU, so that no GPU is waited for."""
    total = torch.tensor(number)
    with _others_alive():
        dist.all_reduce(total)
    return int(total)


def _leave_note(error: Exception, rank: int, path: Path) -> None:
    """Write an error for the process that started this one.

    An error other than a refusal may only be the consequence of another process's failure. It waits, so that the other
    one ends first.
    """
    try:
        pickle.loads(pickle.dumps(error))
        portable = error
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
    note = {"time": time.time(), "rank": rank, "error": portable, "traceback": traceback.format_exc()}
    path.write_bytes(pickle.dumps(note))
    if isinstance(error, OtherMachineError) or not isinstance(error, ValueError | OSError):
        time.sleep(10 * POLL)


def read_notes(folder: Path) -> list[dict[str, Any]]:
    """Notes of this machine's failed processes, the earliest first."""
    notes = [pickle.loads(path.read_bytes()) for path in folder.glob("error_*.pickle")]
    return sorted(notes, key=lambda note: note["time"])
