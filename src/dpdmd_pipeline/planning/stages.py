"""Cost of every stage of a run, before its first node: network passes, their operations, bytes on the disk, hours."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from dpdmd_pipeline.backbones.options import resolve_device
from dpdmd_pipeline.planning.checks import anchor_steps
from dpdmd_pipeline.planning.cost import (
    Passes,
    TeacherSettings,
    anchor_passes,
    cycle_cost,
    describe_cycle,
    watch_cost,
)
from dpdmd_pipeline.planning.disk import written_bytes
from dpdmd_pipeline.planning.memory import GIB
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.training.options import TrainOptions

log = logging.getLogger(__name__)

# Datasets that a stage writes, by stage; students go by their parameter groups
WRITTEN = {
    "download": ("teacher",),
    "prompts": ("embeddings",),
    "anchors": ("anchors",),
    "train_dmd": ("student_dmd", "train_state"),
    "train": ("student", "train_state"),
    "evaluate": ("images", "pictures"),
    "export": ("export",),
}


class StageCost(NamedTuple):
    """Cost of one stage, or of one student."""

    stage: str
    passes: Passes  # through the denoising network, of all samples; without text encoders, autoencoder and metrics
    written: int  # bytes on the disk


def stage_costs(plan: Plan) -> Iterator[StageCost]:
    """Cost of every stage of the run in their order, without what it reuses."""
    sizes, passes = {**written_bytes(plan), **dict.fromkeys(plan.reused, 0)}, dict(_passes(plan))
    for stage, names in WRITTEN.items():
        written = sum(sizes.get(name, 0) for name in names)
        if (written or stage in passes) and stage not in plan.finished:
            yield StageCost(stage, passes.get(stage, Passes()), written)


def _passes(plan: Plan) -> Iterator[tuple[str, Passes]]:
    if "anchors" in plan.folders and plan.anchors.mode == "cached" and plan.prompts and "anchors" not in plan.reused:
        steps = anchor_steps(plan.anchors, plan.model, plan.backbone.num_steps)
        one = anchor_passes(steps, plan.anchors.with_denoised, plan.backbone.guidance_scale)
        yield "anchors", math.prod(plan.anchored) * one
    for group, options in plan.trained.items():
        yield group, training_passes(plan, options)
    if plan.drawn and plan.prompts and "images" not in plan.reused:
        pictures = plan.prompts.evaluated * plan.drawn.facts["images_per_prompt"]
        yield "evaluate", pictures * Passes(sum(plan.drawn.evaluations.values()))


def teacher_settings(plan: Plan, options: TrainOptions) -> TeacherSettings:
    """The teacher's part in the cost of a student."""
    online = plan.anchors.mode == "online"
    steps = anchor_steps(plan.anchors, plan.model, plan.backbone.num_steps) if online else []
    return TeacherSettings(
        guidance_scale=plan.backbone.guidance_scale,
        online_anchors=steps[: options.anchored_steps],
        with_denoised=plan.anchors.with_denoised,
        num_steps=plan.backbone.num_steps,
    )


def training_passes(plan: Plan, options: TrainOptions) -> Passes:
    """All passes of a student's training and of its measurements."""
    recipe, teacher = options.recipe(), teacher_settings(plan, options)
    cost = cycle_cost(recipe, options.execution(), teacher)
    cycles = recipe.batch_size * (recipe.max_steps * cost.cycle + cost.warmup)
    return cycles + watch_cost(recipe, teacher, plan.prompts and plan.prompts.trained)


# ---- words


def describe_stages(costs: Sequence[StageCost], forward_flops: float | None, rate: float | None) -> list[str]:
    """A table for the log.

    Args:
        forward_flops: operations of one sample's forward pass, if they are counted.
        rate: operations that one GPU does in a second, if it is measured.
    """
    lines = [f"{'cost of':10} {'forwards':>13} {'PFLOP':>10} {'disk GiB':>9}" + "   GPU hours" * bool(rate)]
    for cost in costs:
        flops = cost.passes.total * (forward_flops or 0)
        work = f"{cost.passes.total:,.0f}" if cost.passes.total else "", f"{flops / 1e15:,.3g}" if flops else ""
        hours = f" {flops / rate / 3600:11,.2g}" if flops and rate else ""
        lines.append(f"{cost.stage:10} {work[0]:>13} {work[1]:>10} {cost.written / GIB:9,.3f}{hours}".rstrip())
    if rate:
        lines.append(f"GPU hours: at least, at {rate / 1e12:,.0f} TFLOP/s, this card's rate for products of matrices")
    return lines


def matmul_rate(device: torch.device, dtype: torch.dtype, size: int = 8192, repeats: int = 10) -> float:
    """Operations in a second that a device does in products of square matrices."""
    factor = torch.ones(size, size, device=device, dtype=dtype)

    def seconds(times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            product = factor @ factor
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - begin

    seconds(2)
    return repeats * 2 * size**3 / seconds(repeats)


def log_costs(plan: Plan) -> None:
    """Log the cycle of each student, and the table; only of a real teacher is either worth a line on the screen.

    Operations of embedded teachers are not counted: they are small.
    """
    level = logging.INFO if plan.is_pretrained else logging.DEBUG
    for group, options in plan.trained.items():
        if group not in plan.finished:
            log.log(level, "%s", describe_cycle(options.recipe(), options.execution(), teacher_settings(plan, options)))
    costs = list(stage_costs(plan))
    log.debug("for the screen", extra={"passes": {cost.stage: cost.passes.total for cost in costs}})
    flops = plan.estimates.forward_flops(plan.train.recipe()) if plan.is_pretrained and plan.train else None
    on_gpu = flops and torch.cuda.is_available() and resolve_device(plan.train.device).type == "cuda"
    rate = matmul_rate(torch.device("cuda"), getattr(torch, plan.backbone.dtype)) if on_gpu else None
    for line in describe_stages(costs, flops, rate) if costs else []:
        log.log(level, "%s", line)
