"""Seconds per cycle against batch size, resolution and number of processes.

python benchmarks/bench_scaling.py
python benchmarks/bench_scaling.py --env sd35 --config sd35_medium --device cuda --processes 1 \\
    --batch 4 --batches 1 2 4 --resolutions 512 1024
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import timing
import workload
from dpdmd_pipeline.training.launch import Launch, Member, launched
from record import record
from timing import Duration
from workload import Workload, same_batch

SHARED_CYCLES = 3  # timed in each launch of several processes
LAUNCHES = 2  # per number of processes


def main(args: argparse.Namespace) -> None:
    """Measure one axis after the other; along an axis all sizes alternate."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(args, Path(folder) / "first")
        which = timing.clock(work.device)
        by_batch = _by_batch(work, args)
        by_resolution = _by_resolution(work, args, Path(folder))
        by_processes = _by_processes(work, args)
    measured = {
        **{f"batch {size}": _row(durations, which, size) for size, durations in by_batch.items()},
        **{f"resolution {size}": _row(durations, which, args.batch) for size, durations in by_resolution.items()},
        # Only wall time is common to processes that work at the same time
        **{f"processes {count}": _row(durations, "wall", args.batch) for count, durations in by_processes.items()},
    }
    about = {
        "seconds of batches and resolutions are": {"cpu": "of processor time", "wall": "by the wall"}[which],
        "seconds of processes are": "by the wall, all on this machine",
        "settings": work.settings(),
    }
    record(args.result or "scaling", {**measured, **about, **timing.conditions()})


def _row(durations: list[Duration], which: str, batch: int) -> dict[str, Any]:
    seconds = timing.spread(timing.seconds(durations, which))
    return {"seconds per cycle": seconds, "milliseconds per sample and cycle": 1000 * seconds["median"] / batch}


def _by_batch(work: Workload, args: argparse.Namespace) -> dict[int, list[Duration]]:
    with ExitStack() as loops:
        contenders = {}
        for size in args.batches:
            _, records = work.start(work.options(**same_batch(size)))
            contenders[size] = loops.enter_context(closing(records)).__next__
        return timing.alternate(contenders, args.seconds / 3, at_least=3)


def _by_resolution(work: Workload, args: argparse.Namespace, folder: Path) -> dict[int, list[Duration]]:
    with ExitStack() as loops:
        contenders = {}
        for resolution in args.resolutions:
            changes = {"resolution": resolution, "config": None, "teacher": work.teacher}
            changed = workload.prepare(argparse.Namespace(**{**vars(args), **changes}), folder / str(resolution))
            _, records = changed.start(changed.train)
            contenders[resolution] = loops.enter_context(closing(records)).__next__
        return timing.alternate(contenders, args.seconds / 3, at_least=3)


def _by_processes(work: Workload, args: argparse.Namespace) -> dict[int, list[Duration]]:
    """Share one batch among several processes; their launch is not timed."""
    durations: dict[int, list[Duration]] = {count: [] for count in args.processes}
    for _ in range(LAUNCHES):
        for count in args.processes:
            share = args.batch // count
            options = work.options(student_micro_batch=share, fake_score_micro_batch=share, rollout_micro_batch=share)
            launch = Launch(count, 1, None, "scaling", work.device.type == "cuda")
            records = launched(_run_share, replace(work, train=options), launch)
            durations[count] += [Duration(each["wall"], each["cpu"]) for each in records]
    return durations


def _run_share(work: Workload, member: Member) -> bool:
    """Run a few cycles on one process's share of the batch."""
    _, records = work.start(work.train)
    with closing(records):
        next(records)  # warms up
        for _ in range(SHARED_CYCLES):
            member.wait_for_all()
            member.report(timing.measure(records.__next__)._asdict())
    return True


if __name__ == "__main__":
    options = workload.parser(__doc__)
    options.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16])
    options.add_argument("--resolutions", nargs="+", type=int, default=[32, 64])
    options.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    main(options.parse_args())
