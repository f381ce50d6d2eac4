"""Launch a job in several processes, on one machine or more, with torch's elastic launcher.

The starting process does not train. It reads rank 0's reports from a file, passes on the signal to stop, and raises the
error of the process that failed first. A run in one process needs none of this.
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
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.pool import ExceptionWithTraceback
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

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_POLL = 0.1  # seconds
_MET = "met"  # file that exists once the processes have met
_RECORDS = "records.jsonl"  # file of the reports of rank 0
_MEETING_TIMEOUT = 900  # seconds in which all machines must have started
_KILL_TIMEOUT = 40  # seconds; the launcher itself waits 30 for processes that it ends
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


Work = Callable[[Any, "Member"], bool]  # of a job that can be pickled; returns True if it was done to its end


def launched(work: Work, job: Any, launch: Launch) -> Iterator[dict[str, Any]]:
    """Run `work(job, member)` in every process; yields the reports of rank 0 as they come.

    Closed early, it asks the processes to stop and waits for them. None of them outlives it or this process.

    Raises:
        Exception: that of the process that failed first, with its traceback as the cause.
        ChildProcessError: if a process was killed.
        KeyboardInterrupt: if the processes were asked to stop, and did.
        SystemExit: with 0 on a machine without rank 0, when its part is done.
        ValueError: if there are fewer GPUs than processes, or the machines do not meet.
    """
    if launch.cuda:
        torch.cuda.empty_cache()  # what finished stages left in this process, such as T5's memory
    before = set(multiprocessing.active_children())
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error is raised here, in one line
    with _passive_waiting(launch), tempfile.TemporaryDirectory(prefix="dpdmd-") as folder_name:
        folder, running = Path(folder_name), Future()
        # Not in the main thread: that one receives signals, and yields the reports.
        Thread(target=_run_elastic, args=(running, work, job, launch, folder), daemon=True).start()
        try:
            yield from _records(folder / _RECORDS, running)
            _conclude(running, folder, launch)
        except GeneratorExit:  # the processes end after their cycle, with a checkpoint
            _signal(signal.SIGTERM, before)
            wait([running])
            with suppress(KeyboardInterrupt, SystemExit):
                _conclude(running, folder, launch)
        finally:  # after a second signal, or an error of ours
            if not running.done():
                _signal(signal.SIGKILL, before)
                wait([running], timeout=_KILL_TIMEOUT)


def _run_elastic(running: Future, work: Work, job: Any, launch: Launch, folder: Path) -> None:
    """Start the processes and wait for them; `running` gets the return values on this machine, by rank."""
    # The processes inherit the mask: a signal during their start is recorded later, and kills none.
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
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
        rdzv_configs={"timeout": _MEETING_TIMEOUT},
        max_restarts=0,
        monitor_interval=_POLL,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        local_addr=_own_address(rendezvous),
    )


def _own_address(rendezvous: str) -> str:
    """This machine's address towards the rendezvous; a ValueError if that has none. Nothing is sent."""
    host, port = rendezvous.rsplit(":", 1)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, int(port) or 1))
            own = probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"launch.rendezvous={rendezvous}: {error.strerror}; give host:port of a machine") from error
    return host if own.startswith("127.") else own  # a machine's own name often means a loopback address


@contextmanager
def _passive_waiting(launch: Launch) -> Iterator[None]:
    """Keep processes with more threads than cores from waiting for each other in busy loops; they inherit this."""
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
    """Lines of a growing file, until its writer has ended."""
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
    """Send a signal to the processes started since `before`."""
    for process in set(multiprocessing.active_children()) - before:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


# ---- end of the processes


def _conclude(running: Future, folder: Path, launch: Launch) -> None:
    """Raise the error or the interrupt with which the processes ended, if any."""
    try:
        finished = running.result()
    except ChildFailedError as error:
        first = _first_failure(error, folder, launch)
        raise first from first.__cause__  # the traceback in its own process
    except RendezvousError as error:
        if (folder / _MET).exists():  # the rendezvous ended with its machine
            raise OtherMachineError from error
        raise ValueError(
            f"{launch.machines} machines did not meet at {launch.rendezvous} ({error}): start the same command on "
            f"every one within {_MEETING_TIMEOUT // 60} minutes, with the same options"
        ) from error
    if not all(finished.values()):
        log.info("the processes have stopped between two steps, with a checkpoint: run the same command to continue")
        raise KeyboardInterrupt
    if 0 not in finished:
        log.info("this machine's part is done; the machine of the first process writes the result")
        raise SystemExit(0)


def _first_failure(failed: ChildFailedError, folder: Path, launch: Launch) -> BaseException:
    """The error of the process that failed first; the others only fail because of it."""
    rank, failure = failed.get_first_failure()
    if -failure.exitcode in _STOP_SIGNALS:  # work that called `end_at_once`
        return KeyboardInterrupt()
    errors = sorted(folder.glob(_error_file(folder, "*").name), key=lambda path: path.stat().st_mtime_ns)
    # A process that left its error may still crash on its way out, if torch's threads outlive the interpreter
    killed = failure.exitcode < 0 and _error_file(folder, rank) not in errors
    if killed or not errors:
        end = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        return ChildProcessError(
            f"process {rank} of {launch.processes * launch.machines} was ended by {end}: if memory ran out, lower "
            "launch.processes or the batch sizes; then run the same command again, finished work is kept"
        )
    return pickle.loads(errors[0].read_bytes())


# ---- one of the processes


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
        for number in _STOP_SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        for number in self.signals:
            os.kill(os.getpid(), number)


def _enter(work: Work, job: Any, launch: Launch, folder: Path, parent: int) -> bool:
    """Join the other processes and do the work; returns True if it was done to its end."""
    rank, signals, met = int(os.environ["RANK"]), _record_signals(), Event()
    Thread(target=_end_with, args=(parent, met), daemon=True).start()
    try:
        _join(launch)
        met.set()
        (folder / _MET).touch()
        member = Member(rank, int(os.environ["WORLD_SIZE"]), folder / _RECORDS, signals)
        finished = work(job, member)
        member.wait_for_all()
        dist.destroy_process_group()
    except Exception as error:
        _leave(error, _error_file(folder, rank))
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
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: signals.append(number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    return signals


def _end_with(parent: int, met: Event) -> None:
    """End if the parent ends before all have met; this process would wait for hours."""
    while not met.wait(_POLL):
        if os.getppid() != parent:
            os._exit(1)


# ---- failures


class OtherMachineError(ChildProcessError):
    """A process on another machine has failed; the message there tells more."""

    def __str__(self) -> str:
        return (
            "a process on another machine has ended: read the error there, then run the same command on every machine "
            "again; finished work is kept"
        )


def _error_file(folder: Path, rank: int | str) -> Path:
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
        time.sleep(10 * _POLL)
