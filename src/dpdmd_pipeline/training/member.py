"""One of many processes: how it joins the others, its view of them, and the error that it leaves when it fails."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.pool import ExceptionWithTraceback
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
    """Number of processes, and where they run."""

    processes: int  # on each machine
    machines: int  # all run the same command
    rendezvous: str | None  # "host:port" of one machine that all can reach; None on a single machine
    run: str  # name of the run, the same on every machine
    cuda: bool  # each process has a GPU of its own
    # True divides a machine's cores among its processes. False gives each the threads of a single process, so it
    # computes the same to the bit.
    share_cores: bool = True


@dataclass(frozen=True)
class Member:
    """A process, as seen by the work in it."""

    rank: int
    size: int  # number of processes on all machines
    records: Path  # file of the reports of rank 0
    signals: list[int]  # received ones that ask to stop

    def report(self, record: dict[str, Any]) -> None:
        """Send a record to the process that started all; ranks other than 0 send nothing."""
        if self.rank == 0:
            with self.records.open("a") as file:
                file.write(json.dumps(record) + "\n")

    def gather(self, value: Any) -> list[Any]:
        """Values of all processes, by rank. It goes over the CPU, so no GPU is waited for."""
        values = [None] * self.size
        try:
            dist.all_gather_object(values, value)
        except RuntimeError as error:  # gloo: a connection is closed
            raise OtherMachineError from error
        return values

    def asked_to_stop(self) -> bool:
        """True if any process received a signal to stop. All must call this together, and get the same answer."""
        return any(self.gather(bool(self.signals)))

    def wait_for_all(self) -> None:
        """Wait until all processes have come here."""
        self.gather(None)

    def end_at_once(self) -> None:
        """Let signals end the process from now on: its work needs no cleanup."""
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for number in self.signals:
            os.kill(os.getpid(), number)


Work = Callable[[Any, Member], bool]  # of a job that can be pickled; returns True if it was done to its end


def enter(work: Work, job: Any, launch: Launch, folder: Path, parent: int) -> bool:
    """Join the other processes and do the work; returns True if it was done to its end."""
    rank, signals, met = int(os.environ["RANK"]), _record_signals(), Event()
    Thread(target=_end_with, args=(parent, met), daemon=True).start()
    try:
        _join(launch)
        met.set()
        (folder / MET).touch()
        member = Member(rank, int(os.environ["WORLD_SIZE"]), folder / RECORDS, signals)
        finished = work(job, member)
        member.wait_for_all()
        dist.destroy_process_group()
    except Exception as error:
        _leave(error, error_file(folder, rank))
        raise
    if os.getppid() != parent:  # nobody waits for an answer
        sys.exit(1)
    return finished


def _join(launch: Launch) -> None:
    """Meet the other processes; a ValueError if there are too few GPUs, or another number of processes."""
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
    if launch.share_cores and "OMP_NUM_THREADS" not in os.environ:  # else the user has decided
        threads = max(1, len(os.sched_getaffinity(0)) // launch.processes)
        os.environ["OMP_NUM_THREADS"] = str(threads)  # accelerate would warn
        torch.set_num_threads(threads)
    # Older versions of torch lack the successor of that argument
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    backend = "cpu:gloo,cuda:nccl" if launch.cuda else "gloo"
    dist.init_process_group(backend, timeout=_EXCHANGE_TIMEOUT)


def _record_signals() -> list[int]:
    """Record the signals that ask to stop from now on, so that all processes stop after the same step."""
    signals: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: signals.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    return signals


def _end_with(parent: int, met: Event) -> None:
    """End if the parent ends before all have met; this process would wait for hours."""
    while not met.wait(POLL):
        if os.getppid() != parent:
            os._exit(1)


# ---- failures


class OtherMachineError(ChildProcessError):
    """A process on another machine has failed; the message there tells more."""

    def __init__(
        self,
        message: str = "a process on another machine has ended: read the error there, then run the same command on "
        "every machine again; finished work is kept",
    ) -> None:
        super().__init__(message)


def error_file(folder: Path, rank: int | str) -> Path:
    """File of a process's error, or the pattern of all such files."""
    return folder / f"error_{rank}.pickle"


def _leave(error: Exception, path: Path) -> None:
    """Write an error and its traceback for the process that started this one.

    An error other than a refusal may only be the consequence of another process's failure. It waits, so that the other
    one ends first.
    """
    try:
        content = pickle.dumps(ExceptionWithTraceback(error, error.__traceback__))
        pickle.loads(content)
    except Exception:
        portable = RuntimeError(f"{type(error).__name__}: {error}")
        content = pickle.dumps(ExceptionWithTraceback(portable, error.__traceback__))
    path.write_bytes(content)
    if isinstance(error, OtherMachineError) or not isinstance(error, ValueError | OSError):
        time.sleep(10 * POLL)
