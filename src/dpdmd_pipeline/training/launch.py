"""Launch a job in several processes, on one machine or more; torch's elastic launcher watches those of a machine.

The starting process does not train. It reads rank 0's reports from a file, passes on the signal to stop, and raises the
error of the process that failed first. A run in one process needs none of this.
"""

from __future__ import annotations

import gc
import json
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from multiprocessing.pool import ExceptionWithTraceback
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from dpdmd_pipeline.training.machines import Meeting, OtherMachineError, Place, meet
from dpdmd_pipeline.training.signals import STOP_SIGNALS, recorded_signals

log = logging.getLogger(__name__)

_POLL = 0.1  # seconds
_RECORDS = "records.jsonl"  # file of the reports of rank 0
_START_TIMEOUT = timedelta(minutes=15)  # in which the processes of all machines must have started
_PATIENCE = 30  # seconds in which processes notice themselves that those of another machine have ended
_KILL_TIMEOUT = 40  # seconds; the launcher itself waits 30 for processes that it ends
_EXCHANGE_TIMEOUT = timedelta(hours=2)  # all processes wait while one writes a checkpoint


@dataclass(frozen=True)
class Launch:
    """Number of processes, and where they run."""

    processes: int  # on each machine
    machines: int  # all run the same command
    rendezvous: str | None  # "host:port" of the first machine; None on a single one
    run: str  # name of the run
    cuda: bool  # each process has a GPU of its own
    # True divides a machine's cores among its processes. False gives each the threads of a single process, so it
    # computes the same to the bit.
    share_cores: bool = True


Processes = set[multiprocessing.process.BaseProcess]
Work = Callable[[Any, "Member"], bool]  # of a job that can be pickled; returns True if it was done to its end


def launched(work: Work, job: Any, launch: Launch) -> Iterator[dict[str, Any]]:
    """Run `work(job, member)` in every process; yields the reports of rank 0 as they come.

    Closed early, or after a first signal, it asks the processes to stop and waits for them. None of them outlives it or
    this process.

    Raises:
        Exception: that of the process that failed first, with its traceback as the cause.
        ChildProcessError: if a process was killed, or another machine has failed.
        KeyboardInterrupt: if the processes were asked to stop, and did.
        SystemExit: with 0 on another machine than the first, when the run there has ended.
        ValueError: if there are fewer GPUs than processes, or the machines do not meet.
    """
    meeting = place = None
    if launch.machines > 1:
        meeting = meet_or_help(launch.rendezvous, launch.machines)
        place = meeting.call(asdict(launch))
    yield from _launched(work, job, launch, meeting, place)


def meet_or_help(rendezvous: str, machines: int) -> Meeting:
    """Meet the other machines; all but the first one start their processes whenever that launches a job.

    Raises:
        SystemExit: with 0 on another machine than the first, when the run there has ended.
    """
    meeting = meet(rendezvous, machines)
    if meeting.machine == 0:
        return meeting
    try:
        while call := meeting.next_call():
            launch, place = call
            for _ in _launched(None, None, Launch(**launch), meeting, place):
                pass
    finally:
        meeting.leave()
    log.info("this machine's part is done: the first one has evaluated and written the results")
    raise SystemExit(0)


def _launched(
    work: Work | None, job: Any, launch: Launch, meeting: Meeting | None, place: Place | None
) -> Iterator[dict[str, Any]]:
    """The processes of this machine; on another one than the first, they get work and job from there."""
    if launch.cuda:
        gc.collect()
        torch.cuda.empty_cache()  # what finished stages left in this process, such as T5's memory
    before = set(multiprocessing.active_children())
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error is raised here, in one line
    temporary = tempfile.TemporaryDirectory(prefix="dpdmd-")
    with _passive_waiting(launch), temporary as folder_name, recorded_signals() as signals:
        folder, running = Path(folder_name), Future()
        # Not in the main thread: that one receives signals, and yields the reports.
        args = work, job, launch, folder, os.getpid(), place
        Thread(target=_run_elastic, args=(running, *args), daemon=True).start()
        try:
            yield from _records(folder / _RECORDS, running, meeting, signals, before)
            _conclude(running, folder, launch, place)
        except GeneratorExit:  # the processes end after their cycle, with a checkpoint
            _signal(signal.SIGTERM, before)
            wait([running])
            with suppress(KeyboardInterrupt):
                _conclude(running, folder, launch, place)
        finally:  # after a second signal, or an error of ours
            if not running.done():
                _signal(signal.SIGKILL, before)
                wait([running], timeout=_KILL_TIMEOUT)


def _run_elastic(running: Future, work: Work | None, job: Any, launch: Launch, folder: Path, *rest: Any) -> None:
    """Start the processes and wait for them; `running` gets the return values on this machine, by local rank."""
    # The processes inherit the mask: a signal during their imports ends them later, without a traceback.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        running.set_result(elastic_launch(_config(launch, folder), _enter)(work, job, launch, folder, *rest))
    except BaseException as error:
        running.set_exception(error)


def _config(launch: Launch, folder: Path) -> LaunchConfig:
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=launch.processes,
        run_id=launch.run,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        monitor_interval=_POLL,
        start_method="spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),
        local_addr="127.0.0.1",
    )


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


def _records(
    path: Path, running: Future, meeting: Meeting | None, signals: list[int], before: Processes
) -> Iterator[dict[str, Any]]:
    """Lines of a growing file, until its writer has ended; passes the first signal on to the processes.

    Raises:
        OtherMachineError: if another machine has ended, and the processes here do not notice it.
    """
    read, passed_on = 0, False
    while True:
        ended = running.done()
        content = path.read_bytes()[read:] if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        read += len(whole)
        yield from map(json.loads, whole.splitlines())
        if ended:
            return
        if signals and not passed_on:
            passed_on = _signal(signals[0], before)
        if meeting and meeting.is_over() and wait([running], _PATIENCE).not_done:
            raise OtherMachineError
        time.sleep(_POLL)


def _signal(number: int, before: Processes) -> bool:
    """Send a signal to the processes started since `before`; returns True if there are any."""
    processes = set(multiprocessing.active_children()) - before
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
    return bool(processes)


# ---- end of the processes


def _conclude(running: Future, folder: Path, launch: Launch, place: Place | None) -> None:
    """Raise the error or the interrupt with which the processes ended, if any."""
    try:
        finished = running.result()
    except ChildFailedError as error:
        first = _first_failure(error, folder, launch, place)
        raise first from first.__cause__  # the traceback in its own process
    if not all(finished.values()):
        log.info("the processes have stopped between two steps, with a checkpoint: run the same command to continue")
        raise KeyboardInterrupt


def _first_failure(failed: ChildFailedError, folder: Path, launch: Launch, place: Place | None) -> BaseException:
    """The error of the process that failed first; the others only fail because of it."""
    rank, failure = failed.get_first_failure()
    if -failure.exitcode in STOP_SIGNALS:  # before its work, or the work has called `end_at_once`
        return KeyboardInterrupt()
    errors = sorted(folder.glob(_error_file(folder, "*").name), key=lambda path: path.stat().st_mtime_ns)
    # A process that left its error may still crash on its way out, if torch's threads outlive the interpreter
    killed = failure.exitcode < 0 and _error_file(folder, rank) not in errors
    if killed or not errors:
        end = failure.signal_name() if failure.exitcode < 0 else f"exit code {failure.exitcode}"
        rank += place.machine * launch.processes if place else 0
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
        _let_signals_end_this()
        for number in self.signals:
            os.kill(os.getpid(), number)


def _enter(work: Work | None, job: Any, launch: Launch, folder: Path, parent: int, place: Place | None) -> bool:
    """Join the other processes and do the work; returns True if it was done to its end."""
    _let_signals_end_this()  # also that of the system if the parent ends: the other processes may not come for long
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    try:
        _join(launch, place)
        member = Member(dist.get_rank(), dist.get_world_size(), folder / _RECORDS, _record_signals())
        if place:
            (work, job), *_ = member.gather((work, job) if member.rank == 0 else None)
        finished = work(job, member)
        member.wait_for_all()
        dist.destroy_process_group()
    except Exception as error:
        _leave(error, _error_file(folder, os.environ["LOCAL_RANK"]))
        raise
    if os.getppid() != parent:  # nobody waits for an answer
        sys.exit(1)
    return finished


def _join(launch: Launch, place: Place | None) -> None:
    """Meet the other processes; a ValueError if there are too few GPUs, or if they do not come."""
    local, size = int(os.environ["LOCAL_RANK"]), launch.processes * launch.machines
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
    store = None  # of the launcher
    if place:
        rank = place.machine * launch.processes + local
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size)}  # accelerate reads them
        try:
            store = dist.TCPStore(place.host, place.port, size, is_master=rank == 0, timeout=_START_TIMEOUT)
        except RuntimeError as error:
            raise ValueError(
                f"the processes of {launch.machines} machines did not meet at {place.host}, port {place.port}: let the "
                "machines reach each other at every port"
            ) from error
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_EXCHANGE_TIMEOUT)


def _let_signals_end_this() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def _record_signals() -> list[int]:
    """Record the signals that ask to stop from now on, so that all processes stop after the same step."""
    signals: list[int] = []
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _frame: signals.append(number))
    return signals


# ---- failures


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
