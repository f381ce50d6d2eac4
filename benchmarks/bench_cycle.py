"""Cycles per second of our loop against the published one, the gain of each fast option, and the shares of a cycle.

A cycle is five updates of the fake score and one of the student. All contenders alternate in one process.

    python benchmarks/bench_cycle.py
    python benchmarks/bench_cycle.py --env sd35 --config sd35_medium --device cuda --batch 4 --shared-networks --only
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import timing
import workload
from dpdmd_pipeline.datasets.sharded import ShardedTensors
from dpdmd_pipeline.planning.cost import TeacherSettings, cycle_cost
from dpdmd_pipeline.training import anchors, draws
from dpdmd_pipeline.training.options import TrainOptions
from record import record
from timing import Duration, Shares, replaced
from workload import CHEAPER, FAST, Workload

REFERENCE, PLAIN, OURS = "published loop", "published loop without pictures", "ours, paper-faithful"
ONLINE = "anchors computed online"
# Name -> its changes in the group `train`; the result lists variants whose options this version lacks
VARIANTS: dict[str, dict[str, Any]] = {
    ONLINE: {},
    # Variants that change the student only by rounding
    "fused AdamW": {"fused": True},
    "pictures of a cycle drawn at once": {"rollout_micro_batch": "cycle"},
    CHEAPER: {"rollout_micro_batch": "cycle", "fused": True},
    f"{CHEAPER}, blocks compiled": {"rollout_micro_batch": "cycle", "fused": True, "compile": "blocks"},
    f"{CHEAPER}, compiled whole": {"rollout_micro_batch": "cycle", "fused": True, "compile": "whole"},
    "blocks compiled": {"compile": "blocks"},
    "the teacher's two passes apart": {"guidance_batch": "apart"},
    "channels last": {"channels_last": True},
    "gradient checkpointing the other way": {"gradient_checkpointing": "other"},
    "micro-batches of a quarter": {
        "student_micro_batch": "quarter",
        "fake_score_micro_batch": "quarter",
        "rollout_micro_batch": "quarter",
    },
    # Variants that change the mathematics
    "random graded step": {"graded_steps": "random"},
    "last step graded": {"graded_steps": "last"},
    "shared rollout": {"fake_rollout": "shared"},
    "random graded step, shared rollout": FAST,
    "random graded step, shared rollout, fused AdamW": {**FAST, "fused": True},
    "random graded step, shared rollout, fused AdamW, compiled whole": {**FAST, "fused": True, "compile": "whole"},
}
SHARE_CYCLES = 6
OPTIMIZER = [(torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"), (torch.optim.Optimizer, "zero_grad")]


@dataclass(frozen=True)
class Times:
    """Times of all contenders.

    Attributes:
        first: of the first cycle, by contender; it includes compiling.
        cycles: of later cycles.
        absent: variants that did not run, and why.
    """

    first: dict[str, Duration]
    cycles: dict[str, list[Duration]]
    absent: dict[str, str]

    @property
    def baseline(self) -> str:
        """The contender that all others are compared with."""
        return REFERENCE if REFERENCE in self.cycles else OURS

    @property
    def ratio_name(self) -> str:
        """Name of the ratio to the baseline in the result."""
        return "times the published loop" if REFERENCE in self.cycles else "times ours, paper-faithful"


def main(args: argparse.Namespace) -> None:
    """Time all contenders, then the parts of our own cycle."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(args, Path(folder))
        which = timing.clock(work.device)
        times = _time_contenders(work, args, Path(folder) / "compiled")
        passes = {name: _count_passes(work, name) for name in times.cycles}
        measured = {name: _row(work, times, name, which, passes) | _compiling(times, name) for name in times.cycles}
        shares = {} if args.no_shares else cycle_shares(work)
    ratio = times.ratio_name
    record(
        args.result or "cycle",
        {
            **{f"{ratio}, {name}": row[ratio]["median"] for name, row in measured.items()},
            **shares,
            **times.absent,
            "contenders": measured,
            "seconds are": timing.UNITS[which],
            "settings": work.settings(),
            **timing.conditions(),
        },
    )


def _time_contenders(work: Workload, args: argparse.Namespace, compiled: Path) -> Times:
    """Time the first cycle of each contender, then all of them in turn; their networks are freed afterwards."""
    variants = VARIANTS if args.only is None else {name: VARIANTS[name] for name in args.only}
    with ExitStack() as open_loops:
        contenders, absent = _contenders(work, variants, args.shared_networks, open_loops)
        first = {}
        for name, cycle in contenders.items():
            # A new folder each: code compiled earlier must not be reused
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled / str(len(first)))
            try:
                first[name] = timing.measure(cycle)
            except ValueError as error:  # options that this teacher's network does not support
                absent[name] = _refused(error)
        running = {name: contenders[name] for name in first}
        return Times(first, timing.alternate(running, args.seconds, at_least=3), absent)


def _contenders(
    work: Workload, variants: dict[str, dict], shared: bool, open_loops: ExitStack
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """A call per cycle for each contender, and the reason for each variant that is absent."""
    roles, records = work.start(work.train)
    open_loops.enter_context(closing(records))
    contenders: dict[str, Callable[[], object]] = {OURS: records.__next__}
    absent = {}
    if work.backbone.family == "sd3":
        published = work.reference(work.train, roles if shared else None)
        with_pictures, without = published.settings, replace(published.settings, pictures_every=0)
        contenders = {
            REFERENCE: lambda: (setattr(published, "settings", with_pictures), published.cycle()),
            PLAIN: lambda: (setattr(published, "settings", without), published.cycle()),
            **contenders,
        }
    else:
        absent[REFERENCE] = f"is SD3's: with family={work.backbone.family} all are compared with {OURS}"
    for name, changes in variants.items():
        if missing := sorted(set(changes) - set(TrainOptions.model_fields)):
            absent[name] = f"absent: this version has no train.{missing[0]}"
            continue
        try:
            options = _options(work, name)
        except ValueError as error:  # options that do not fit together
            absent[name] = _refused(error)
            continue
        _, records = work.start(options, "online" if name == ONLINE else "cached")
        contenders[name] = open_loops.enter_context(closing(records)).__next__
    return contenders, absent


def _refused(error: ValueError) -> str:
    return f"refused: {' '.join(str(error).split())}"


def _options(work: Workload, name: str) -> TrainOptions:
    """Options of a variant; the run's own options for the other contenders."""
    return work.options(**_changes(work, name))


def _changes(work: Workload, name: str) -> dict[str, Any]:
    """A variant's changes, with numbers in place of words."""
    batch = work.train.batch_size
    values = {
        "other": not work.train.gradient_checkpointing,
        "quarter": max(1, batch // 4),
        "cycle": work.train.fake_score_turns * batch,
    }
    return {key: values.get(value, value) for key, value in VARIANTS.get(name, {}).items()}


def _count_passes(work: Workload, name: str) -> float:
    """Passes through the network per sample and cycle, computed from the options."""
    options, steps = _options(work, name), [level.steps for level in work.anchor_recipe.anchor_levels]
    online = steps if name in (REFERENCE, PLAIN, ONLINE) else ()
    teacher = TeacherSettings(work.backbone.guidance_scale, online)
    return cycle_cost(options.recipe(), options.execution(), teacher).cycle.total


def _row(work: Workload, times: Times, name: str, which: str, passes: dict[str, float]) -> dict[str, Any]:
    cycles, baseline, ratio = times.cycles, times.baseline, times.ratio_name
    seconds = timing.spread(timing.seconds(cycles[name], which))
    pictures = work.train.batch_size * (work.train.fake_score_turns + 1)
    return {
        "cycles per second": 1 / seconds["median"],
        "pictures per second": pictures / seconds["median"],
        "seconds per cycle": seconds,
        "seconds per cycle by the wall": timing.spread(timing.seconds(cycles[name], "wall")),
        ratio: timing.ratios(cycles[baseline], cycles[name], which),
        "counted passes": passes[name],
        f"{ratio}, by counted passes alone": passes[baseline] / passes[name],
    }


def _compiling(times: Times, name: str) -> dict[str, float]:
    """Seconds of compiling, which the first cycle does, and the number of cycles that win them back.

    Only for the first contender of its kind: later ones in this process reuse its compiled code.
    """
    if not name.startswith(f"{CHEAPER}, "):
        return {}
    cycle, before = (
        timing.spread(timing.seconds(times.cycles[each], "wall"))["median"] if each in times.cycles else 0
        for each in (name, CHEAPER)
    )
    compiling = times.first[name].wall - cycle
    return {
        "seconds of compiling, by the wall": compiling,
        **({"cycles until that is won back": compiling / (before - cycle)} if before > cycle else {}),
    }


# ---- shares of a cycle's time


def cycle_shares(work: Workload) -> dict[str, float]:
    """Shares of a cycle: ours, paper-faithful and with the fast options, and the published loop's."""
    shares_by_loop = {
        "share of a cycle": _our_shares(work, {}),
        f"share of a cycle, {CHEAPER}": _our_shares(work, work.cheaper),
        "share of a fast cycle": _our_shares(work, FAST),
        **({"share of the published cycle": _published_shares(work)} if work.backbone.family == "sd3" else {}),
    }
    return {f"{loop}: {name}": share for loop, shares in shares_by_loop.items() for name, share in shares.items()}


def _our_shares(work: Workload, changes: dict[str, Any]) -> dict[str, float]:
    # without gradient checkpointing, whose backward contains forward passes
    roles, records = work.start(work.options(gradient_checkpointing=False, **changes))
    data = [(ShardedTensors, "rows")]
    draw_functions = [
        (module, name)
        for module in (draws, anchors)
        for name in ("noise_from_seeds", "uniform_from_seeds", "sample_seeds")
        if hasattr(module, name)
    ]
    charged = {
        "backward": [(Accelerator, "backward")],
        "optimizer": OPTIMIZER,
        "data: caches": data,
        "data: noise and levels": draw_functions,
    }
    with closing(records):
        return _shares(records.__next__, (roles.teacher, roles.student, roles.fake_score), charged)


def _published_shares(work: Workload) -> dict[str, float]:
    loop = work.reference(work.options(gradient_checkpointing=False), None)
    charged = {
        "backward": [(torch.Tensor, "backward")],
        "optimizer": OPTIMIZER,
        "text encoders": [(loop, "_encode")],
        "anchors": [(loop, "_anchor_velocity")],
        "sampler set-up": [(loop, "_sampler")],
        "pictures": [(loop, "_write_pictures")],
    }
    return _shares(loop.cycle, (loop.teacher, loop.student, loop.fake_score), charged)


def _shares(cycle: Callable[[], object], networks: Sequence[Any], charged: dict[str, list]) -> dict[str, float]:
    """Medians over cycles. Networks are charged by their forward, other work by the functions in `charged`."""
    values: dict[str, list[float]] = {}
    cycle()  # warms up
    for network in networks:
        network.plain_forward = network.forward
    for _ in range(SHARE_CYCLES):
        shares = Shares()
        for network in networks:
            network.forward = shares.wrapped("network forward", network.plain_forward)
        with _charging(shares, charged):
            whole = timing.measure(cycle).wall
        spent = {**shares.spent, "everything else": whole - sum(shares.spent.values())}
        for name, seconds in spent.items():
            values.setdefault(name, []).append(seconds / whole)
    return {name: statistics.median(shares) for name, shares in values.items()}


@contextmanager
def _charging(shares: Shares, charged: dict[str, list]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, functions in charged.items():
            for owner, attribute in functions:
                stack.enter_context(replaced(owner, attribute, lambda f, name=name: shares.wrapped(name, f)))
        yield


if __name__ == "__main__":
    options = workload.parser(__doc__)
    options.add_argument("--only", nargs="*", choices=VARIANTS, help="variants to time; without a name, none")
    options.add_argument("--shared-networks", action="store_true", help="both loops train the same networks")
    options.add_argument("--no-shares", action="store_true", help="leave out the shares of a cycle's time")
    main(options.parse_args())
