"""Cycles per second of our loop against the published one, what each fast option adds, and where a cycle's time goes.

A cycle is five turns of the fake score and one of the student. All contenders take turns in one process.

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
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import timing
import workload
from dpdmd_pipeline.datasets.sharded import ShardedTensors
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.training import anchors, draws
from dpdmd_pipeline.training.cost import TeacherSettings, cycle_cost
from record import record
from timing import Shares, Taken, replaced
from workload import CHEAPER, FAST, Workload

REFERENCE, PLAIN, OURS = "published loop", "published loop without pictures", "ours, paper-faithful"
ONLINE = "anchors computed online"
# Name -> what it changes in the group `train`; options that this version lacks are told as absent
VARIANTS: dict[str, dict[str, Any]] = {
    ONLINE: {},
    # What changes the student by rounding only
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
    # What changes the mathematics
    "random graded step": {"graded_steps": "random"},
    "last step graded": {"graded_steps": "last"},
    "shared rollout": {"fake_rollout": "shared"},
    "random graded step, shared rollout": FAST,
    "random graded step, shared rollout, fused AdamW": {**FAST, "fused": True},
    "random graded step, shared rollout, fused AdamW, compiled whole": {**FAST, "fused": True, "compile": "whole"},
}
SHARE_CYCLES = 6
OPTIMIZER = [(torch.nn.utils, "clip_grad_norm_"), (torch.optim.AdamW, "step"), (torch.optim.Optimizer, "zero_grad")]


def main(asked: argparse.Namespace) -> None:
    """Time all contenders, then look into our own cycle."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(asked, Path(folder))
        which = timing.clock(work.device)
        first, taken, told = _taken(work, asked, Path(folder) / "compiled")
        counted = {name: _counted(work, name) for name in taken}
        measured = {name: _row(work, taken, name, which, counted) | _begun(first, taken, name) for name in taken}
        shares = where_time_goes(work)
    times = _times(taken)
    ratios = {f"{times}, {name}": row[times] for name, row in measured.items()}
    record(
        asked.result or "cycle",
        {
            **{name: value["median"] for name, value in ratios.items()},
            **shares,
            **told,
            "contenders": measured,
            "seconds are": {"cpu": "of this process's processor time", "wall": "by the wall"}[which],
            "settings": work.settings(),
            **timing.conditions(),
        },
    )


def _taken(
    work: Workload, asked: argparse.Namespace, compiled: Path
) -> tuple[dict[str, Taken], dict[str, list[Taken]], dict[str, str]]:
    """Times of all contenders' first cycle and of later ones, and what is to be told of absent variants.

    Their networks are gone afterwards.
    """
    chosen = VARIANTS if asked.only is None else {name: VARIANTS[name] for name in asked.only}
    with ExitStack() as open_loops:
        contenders, told = _contenders(work, chosen, asked.shared_networks, open_loops)
        first = {}
        for name, cycle in contenders.items():
            # or what an earlier contender, or an earlier day, compiled would be taken from there
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(compiled / str(len(first)))
            try:
                first[name] = timing.seconds(cycle)
            except ValueError as error:  # options that this teacher's network does not take
                told[name] = _refused(error)
        running = {name: contenders[name] for name in first}
        return first, timing.alternate(running, asked.seconds, at_least=3), told


def _contenders(
    work: Workload, variants: dict[str, dict], shared: bool, open_loops: ExitStack
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """One call per cycle of each, and what is to be told of the variants that are not there."""
    roles, records = work.start(work.train)
    open_loops.enter_context(closing(records))
    found: dict[str, Callable[[], object]] = {OURS: records.__next__}
    told = {}
    if work.backbone.family == "sd3":
        published = work.reference(work.train, roles if shared else None)
        with_pictures, without = published.settings, replace(published.settings, pictures_every=0)
        found = {
            REFERENCE: lambda: (setattr(published, "settings", with_pictures), published.cycle()),
            PLAIN: lambda: (setattr(published, "settings", without), published.cycle()),
            **found,
        }
    else:
        told[REFERENCE] = f"is SD3's: with family={work.backbone.family} all are compared with {OURS}"
    for name, changes in variants.items():
        if absent := sorted(set(changes) - set(TrainOptions.model_fields)):
            told[name] = f"absent: this version has no train.{absent[0]}"
            continue
        try:
            options = _options(work, name)
        except ValueError as error:  # options that do not go together
            told[name] = _refused(error)
            continue
        _, records = work.start(options, "online" if name == ONLINE else "cached")
        found[name] = open_loops.enter_context(closing(records)).__next__
    return found, told


def _refused(error: ValueError) -> str:
    return f"refused: {' '.join(str(error).split())}"


def _options(work: Workload, name: str) -> TrainOptions:
    """Options of a variant; of the other contenders those of the run."""
    return work.options(**_changes(work, name))


def _changes(work: Workload, name: str) -> dict[str, Any]:
    """What a variant changes, in numbers."""
    batch = work.train.batch_size
    meant = {
        "other": not work.train.gradient_checkpointing,
        "quarter": max(1, batch // 4),
        "cycle": work.train.fake_score_turns * batch,
    }
    return {key: meant.get(value, value) for key, value in VARIANTS.get(name, {}).items()}


def _counted(work: Workload, name: str) -> float:
    """Passes through the network per sample and cycle, before anything is measured."""
    options, steps = _options(work, name), [level.steps for level in work.anchor_recipe.anchor_levels]
    online = steps if name in (REFERENCE, PLAIN, ONLINE) else ()
    teacher = TeacherSettings(work.backbone.guidance_scale, online)
    return cycle_cost(options.recipe(), options.execution(), teacher).cycle.total


def _row(
    work: Workload, taken: dict[str, list[Taken]], name: str, which: str, counted: dict[str, float]
) -> dict[str, Any]:
    seconds = timing.spread(timing.of(taken[name], which))
    pictures = work.train.batch_size * (work.train.fake_score_turns + 1)
    against, times = _compared(taken), _times(taken)
    return {
        "cycles per second": 1 / seconds["median"],
        "pictures per second": pictures / seconds["median"],
        "seconds per cycle": seconds,
        "seconds per cycle by the wall": timing.spread(timing.of(taken[name], "wall")),
        times: timing.ratios(taken[against], taken[name], which),
        "counted passes": counted[name],
        f"{times}, by counted passes alone": counted[against] / counted[name],
    }


def _times(taken: dict[str, list[Taken]]) -> str:
    """How a ratio is called."""
    return "times the published loop" if REFERENCE in taken else "times ours, paper-faithful"


def _compared(taken: dict[str, list[Taken]]) -> str:
    """What all are compared with."""
    return REFERENCE if REFERENCE in taken else OURS


def _begun(first: dict[str, Taken], taken: dict[str, list[Taken]], name: str) -> dict[str, float]:
    """What compiling takes, which is done in the first cycle, and after how many cycles it is won back.

    Of the first contender of its kind alone: what it compiled serves the later ones of this process.
    """
    if not name.startswith(f"{CHEAPER}, "):
        return {}
    cycle, before = (
        timing.spread(timing.of(taken[each], "wall"))["median"] if each in taken else 0 for each in (name, CHEAPER)
    )
    compiling = first[name].wall - cycle
    return {
        "seconds of compiling, by the wall": compiling,
        **({"cycles until that is won back": compiling / (before - cycle)} if before > cycle else {}),
    }


# ---- where time goes


def where_time_goes(work: Workload) -> dict[str, float]:
    """Shares of a cycle of ours, paper-faithful and with both fast options, and of the published loop's."""
    found = {
        "share of a cycle": _our_shares(work, {}),
        f"share of a cycle, {CHEAPER}": _our_shares(work, work.cheaper),
        "share of a fast cycle": _our_shares(work, FAST),
        **({"share of the published cycle": _published_shares(work)} if work.backbone.family == "sd3" else {}),
    }
    return {f"{whose}: {name}": share for whose, shares in found.items() for name, share in shares.items()}


def _our_shares(work: Workload, changes: dict[str, Any]) -> dict[str, float]:
    # without checkpointing, or backward would hold forward passes
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
    """Medians over cycles; everything that is no network is charged by the functions that do it."""
    found: dict[str, list[float]] = {}
    cycle()  # warms up
    for network in networks:
        network.plain_forward = network.forward
    for _ in range(SHARE_CYCLES):
        shares = Shares()
        for network in networks:
            network.forward = shares.wrapped("network forward", network.plain_forward)
        with _charging(shares, charged):
            whole = timing.seconds(cycle).wall
        spent = {**shares.spent, "everything else": whole - sum(shares.spent.values())}
        for name, value in spent.items():
            found.setdefault(name, []).append(value / whole)
    return {name: statistics.median(values) for name, values in found.items()}


@contextmanager
def _charging(shares: Shares, charged: dict[str, list]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, places in charged.items():
            for owner, attribute in places:
                stack.enter_context(replaced(owner, attribute, lambda f, name=name: shares.wrapped(name, f)))
        yield


if __name__ == "__main__":
    options = workload.parser(__doc__)
    options.add_argument("--only", nargs="*", choices=VARIANTS, help="variants to time; none of them without a name")
    options.add_argument("--shared-networks", action="store_true", help="both loops train the same networks")
    main(options.parse_args())
