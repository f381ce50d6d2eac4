"""Seconds of a cycle against the batch, the resolution and the number of processes.

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
from dpdmd_pipeline.training.launch import launched
from dpdmd_pipeline.training.member import Launch, Member
from record import record
from timing import Taken
from workload import Workload

SHARED_CYCLES = 3  # timed in each start of several processes
STARTS = 2  # of each number of processes


def main(asked: argparse.Namespace) -> None:
    """One axis after the other; along an axis all sizes take turns."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(asked, Path(folder) / "first")
        which = timing.clock(work.device)
        by_batch = _by_batch(work, asked)
        by_resolution = _by_resolution(work, asked, Path(folder))
        by_processes = _by_processes(work, asked)
    measured = {
        **{f"batch {size}": _row(taken, which, size) for size, taken in by_batch.items()},
        **{f"resolution {size}": _row(taken, which, asked.batch) for size, taken in by_resolution.items()},
        # Several processes work at the same time: only the wall's time is theirs together
        **{f"processes {count}": _row(taken, "wall", asked.batch) for count, taken in by_processes.items()},
    }
    told = {
        "seconds of batches and resolutions are": {"cpu": "of processor time", "wall": "by the wall"}[which],
        "seconds of processes are": "by the wall, all on this machine",
        "settings": work.settings(),
    }
    record(asked.result or "scaling", {**measured, **told, **timing.conditions()})


def _row(taken: list[Taken], which: str, batch: int) -> dict[str, Any]:
    seconds = timing.spread(timing.of(taken, which))
    return {"seconds per cycle": seconds, "milliseconds per sample and cycle": 1000 * seconds["median"] / batch}


def _by_batch(work: Workload, asked: argparse.Namespace) -> dict[int, list[Taken]]:
    sizes = ("batch_size", "student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")
    with ExitStack() as loops:
        contenders = {}
        for size in asked.batches:
            _, records = work.start(work.options(**dict.fromkeys(sizes, size)))
            contenders[size] = loops.enter_context(closing(records)).__next__
        return timing.alternate(contenders, asked.seconds / 3, at_least=3)


def _by_resolution(work: Workload, asked: argparse.Namespace, folder: Path) -> dict[int, list[Taken]]:
    with ExitStack() as loops:
        contenders = {}
        for resolution in asked.resolutions:
            wanted = argparse.Namespace(**{**vars(asked), "resolution": resolution, "config": None})
            wanted.teacher = work.teacher
            larger = workload.prepare(wanted, folder / str(resolution))
            _, records = larger.start(larger.train)
            contenders[resolution] = loops.enter_context(closing(records)).__next__
        return timing.alternate(contenders, asked.seconds / 3, at_least=3)


def _by_processes(work: Workload, asked: argparse.Namespace) -> dict[int, list[Taken]]:
    """The batch shared by so many processes; they are started anew each time, which is not timed."""
    found: dict[int, list[Taken]] = {count: [] for count in asked.processes}
    for _ in range(STARTS):
        for count in asked.processes:
            share = asked.batch // count
            options = work.options(student_micro_batch=share, fake_score_micro_batch=share, rollout_micro_batch=share)
            where = Launch(count, 1, None, "scaling", work.device.type == "cuda")
            records = launched(_share, replace(work, train=options), where)
            found[count] += [Taken(each["wall"], each["cpu"]) for each in records]
    return found


def _share(work: Workload, member: Member) -> bool:
    """One process's part of a few cycles."""
    _, records = work.start(work.train)
    with closing(records):
        next(records)  # warms up
        for _ in range(SHARED_CYCLES):
            member.wait_for_all()
            member.report(timing.seconds(records.__next__)._asdict())
    return True


if __name__ == "__main__":
    options = workload.parser(__doc__)
    options.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16])
    options.add_argument("--resolutions", nargs="+", type=int, default=[32, 64])
    options.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    main(options.parse_args())
