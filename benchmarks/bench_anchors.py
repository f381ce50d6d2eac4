"""Cost of the anchor cache over the bare teacher, time that training waits for it, and time that a sweep saves.

Bare teacher forwards alternate with the whole anchors stage (seeds, teacher, shards, hashes, fsync).

    python benchmarks/bench_anchors.py
    python benchmarks/bench_anchors.py --env sd35 --config sd35_medium --device cuda --batch 4
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from contextlib import ExitStack, closing
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

import timing
import workload
from dpdmd_pipeline.backbones.base import Backbone, guided
from dpdmd_pipeline.datasets.sharded import ShardedDataset, ShardedTensors
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.planning.cost import TeacherSettings, anchor_passes, cycle_cost
from dpdmd_pipeline.training.recipe import AnchorRecipe
from record import record
from workload import CHEAPER, FAST, Workload

SEEDS_PER_PROMPT = 4
WEIGHTS = (0.5, 1.0, 2.0, 4.0)  # diversity weights of the sweep
SWEEP_CYCLES = 2  # per run of the sweep
BARE, STAGE, LOADING = "bare teacher forwards", "anchors stage", "loading the teacher"


def main(args: argparse.Namespace) -> None:
    """Time the stage against the teacher alone, then a sweep against runs without a cache."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(args, Path(folder))
        which = timing.clock(work.device)
        anchors, stage = _stage(work, args, which)
        measured = {**stage, **_sweep(work, which, anchors, {}, "sweep")}
        measured |= _sweep(work, which, anchors, work.cheaper, f"sweep, {CHEAPER}")
        measured |= {f"sweep: cached / online, counted, {name}": value for name, value in _counted(work).items()}
        measured |= _waiting(work)
    record(args.result or "anchors", {**measured, "settings": work.settings(), **timing.conditions()})


# ---- the stage


def _stage(work: Workload, args: argparse.Namespace, which: str) -> tuple[float, dict[str, Any]]:
    """Seconds per anchor of the whole stage, and entries for the result."""
    recipe = AnchorRecipe(
        **{**work.anchor_recipe.model_dump(), "mode": "cached", "seeds_per_prompt": SEEDS_PER_PROMPT, "batch_size": 60}
    )
    rows = list(range(len(work.prompts))) * SEEDS_PER_PROMPT
    records = [{"text": text, "train": True, "eval": False} for text in work.prompts]
    every_prompt = work.train.model_copy(update={"max_steps": len(records)})
    make = partial(make_anchors, records, work.embeddings, work.teacher, work.backbone, recipe, every_prompt)
    lazy = make()
    family = work.backbone.load(work.teacher, args.device)
    network, number = family.load_model().requires_grad_(False).eval(), count()

    def stage() -> None:  # includes the manifest, which hashes the teacher
        ShardedDataset(filepath=str(work.folder / f"stage_{next(number)}")).save(make())

    bare = partial(_bare_teacher, work, family, network, rows, recipe.batch_size, lazy.manifest["anchor_steps"][-1])
    loading = work.backbone.load(work.teacher, args.device).load_model
    durations = timing.alternate({BARE: bare, STAGE: stage, LOADING: loading}, args.seconds / 2, at_least=3)
    seconds = {name: timing.seconds(calls, which) for name, calls in durations.items()}
    without_loading = [s - load for s, load in zip(seconds[STAGE], seconds[LOADING], strict=True)]
    return timing.spread(seconds[STAGE])["median"] / len(rows), {
        "anchors": len(rows),
        **{f"{name}, seconds": timing.spread(values) for name, values in seconds.items()},
        "overhead of the stage": _overhead(seconds[STAGE], seconds[BARE]),
        "overhead of the stage, the teacher being loaded": _overhead(without_loading, seconds[BARE]),
        "seconds are": timing.UNITS[which],
    }


def _overhead(whole: list[float], bare: list[float]) -> dict[str, float]:
    return timing.spread([w / b - 1 for w, b in zip(whole, bare, strict=True)])


@torch.no_grad()
def _bare_teacher(
    work: Workload, family: Backbone, network: nn.Module, rows: list[int], batch_size: int, last_step: int
) -> None:
    """Run the guided rollouts alone."""
    uncond = work.embeddings.rows([len(work.embeddings) - 1])
    levels = family.schedule(work.backbone.num_steps)[: last_step + 1]
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        cond, empty = ({n: v.to(family.device) for n, v in e.items()} for e in (work.embeddings.rows(batch), uncond))
        noise = noise_from_seeds(range(len(batch)), family.latent_shape).to(family.device)
        rollout(guided(family, network, cond, empty, work.backbone.guidance_scale), noise, levels)


# ---- a sweep over one cache


def _sweep(work: Workload, which: str, seconds_per_anchor: float, changes: dict[str, Any], name: str) -> dict[str, Any]:
    """Time runs that differ in `diversity_weight`: with one cache of a run's samples, and with online anchors."""
    seconds: dict[str, list[float]] = {"cached": [], "online": []}
    for weight in WEIGHTS:
        options = work.options(diversity_weight=weight, **changes)
        with ExitStack() as loops:
            runs = {mode: loops.enter_context(closing(work.start(options, mode)[1])) for mode in seconds}
            durations = timing.alternate({m: r.__next__ for m, r in runs.items()}, budget=0, at_least=SWEEP_CYCLES)
        for mode, cycles in durations.items():
            seconds[mode] += timing.seconds(cycles, which)
    cache = SWEEP_CYCLES * work.train.batch_size * seconds_per_anchor
    cached, online = (sum(values) for values in seconds.values())
    return {
        f"{name}: values of diversity_weight": len(WEIGHTS),
        f"{name}: cycles of each run": SWEEP_CYCLES,
        f"{name}: seconds of the cache": cache,
        f"{name}: seconds of the cached runs": cached,
        f"{name}: seconds of the online runs": online,
        f"{name}: cached / online, measured": (cache + cached) / online,
    }


def _counted(work: Workload) -> dict[str, float]:
    """The same ratio in passes through the network, also for other anchor steps and faster recipes."""
    own, scale = work.anchor_recipe.anchor_levels[0].steps, work.backbone.guidance_scale
    ratios = {}
    for steps in sorted({own, 5, 10}):
        for name, changes in {"all steps graded": {}, "random step graded, shared rollout": FAST}.items():
            options = work.options(gradient_checkpointing=False, **changes)
            recipe, execution = options.recipe(), options.execution()
            cached, online = (
                cycle_cost(recipe, execution, TeacherSettings(scale, k)).cycle.total for k in ((), [steps])
            )
            cache = anchor_passes([steps], False, scale).total
            ratios[f"K={steps}, {name}"] = (cache + len(WEIGHTS) * cached) / (len(WEIGHTS) * online)
    return ratios


# ---- waiting


def _waiting(work: Workload) -> dict[str, float]:
    """Share of training that waits for the caches."""
    shares = timing.Shares()
    _, records = work.start(work.train)
    with closing(records):
        next(records)  # maps the files
        with timing.replaced(ShardedTensors, "rows", lambda rows: shares.wrapped("reading", rows)):
            whole = sum(timing.measure(records.__next__).wall for _ in range(SWEEP_CYCLES))
    return {"share of training spent reading caches": shares.spent["reading"] / whole}


if __name__ == "__main__":
    main(workload.parser(__doc__).parse_args())
