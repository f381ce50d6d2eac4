"""Refusals of a run before anything large is read: options that do not fit the teacher, too little memory or disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpdmd_pipeline.backbones.options import resolve_device
from dpdmd_pipeline.planning.checks import (
    check_guidance,
    check_optimizers,
    check_precision,
    check_recipe,
    check_speed,
    check_start,
)
from dpdmd_pipeline.planning.messages import describe
from dpdmd_pipeline.planning.plan import Plan, make_plan
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.wording import one_line


def refuse_run(pipeline: Any, catalog: Any, env: str | None = None) -> list[str]:
    """One line for each reason why a Kedro run cannot succeed, before its first node; for the hooks.

    Runs of `study` and `beyond` are not checked here: their node checks every student before it trains the first.
    """
    teacher = catalog.get("teacher") if "teacher" in catalog else None
    if "teacher" in pipeline.all_outputs() and hasattr(teacher, "load_configs"):
        return [f"the stage `teacher` trains embedded teachers, {teacher.model} is trained: leave the stage out"]
    try:
        plan = make_plan(pipeline, catalog)
        return refusals(plan) if plan else []
    except (ValueError, OSError) as error:
        return [describe(error, env)]


def refusals(plan: Plan, device_memory: int | None = None) -> list[str]:
    """One line for each reason why the run cannot succeed; empty if none is known. Logs its cost.

    Args:
        plan: of the run.
        device_memory: free bytes on the GPU; None asks the GPU, if a student is trained on one.
    """
    from dpdmd_pipeline.planning.disk import full_disks
    from dpdmd_pipeline.planning.gpu import students_too_large

    try:
        lines = [*_refused_options(plan)]
    except (ValueError, OSError) as error:
        return [one_line(error)]
    return lines or [*students_too_large(plan, device_memory), *full_disks(plan)]


def _refused_options(plan: Plan) -> Iterator[str]:
    """Options that the teacher's config does not allow."""
    model = plan.model
    for level in plan.anchors.anchor_levels:
        if level.steps is not None and level.steps >= plan.backbone.num_steps:
            yield (
                f"anchors.anchor_levels steps={level.steps} must be below the teacher's "
                f"backbone.num_steps={plan.backbone.num_steps}"
            )
    for group, options in plan.trained.items():
        try:
            resolve_device(options.device)
            check_precision(plan.backbone, options)
            check_guidance(plan.backbone, options)
            check_speed(plan.teacher, options)
            check_optimizers(options)
            check_recipe(plan.anchors, options)
            _check_levels(plan, model, options)
        except ValueError as error:
            yield f"{group}: {one_line(error)}"


def _check_levels(plan: Plan, model: Any, options: TrainOptions) -> None:
    """Make the student's schedule, and compare its start with the first anchor.

    Raises:
        ValueError: if there is no such schedule, or the anchor is not below the start.
    """
    levels = model.student_schedule(options.grid, options.num_steps)
    steps = plan.anchors.anchor_levels[0].steps
    if options.anchored_steps and steps is not None and steps < plan.backbone.num_steps:
        check_start(levels.sigma[0].item(), model.schedule(plan.backbone.num_steps).sigma[steps].item())
