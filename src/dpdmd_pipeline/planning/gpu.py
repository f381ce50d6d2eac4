"""Check of GPU memory before a student is trained, and the words for a GPU that ran out of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)

GIB = 2**30


def students_too_large(plan: Plan, device_memory: int | None) -> Iterator[str]:
    """One line for each student that does not fit on the GPU; logs the cost of each.

    Args:
        plan: of the run.
        device_memory: free bytes on the GPU; None asks the GPU, if a student is trained on one.
    """
    for group, options in plan.trained.items():
        on_gpu = device_memory is not None or resolve_device(options.device).type == "cuda"
        try:
            estimates = plan.estimates if on_gpu else None
            for line in describe_costs(plan, options, estimates):
                log.info("%s", line)
            if estimates is None:
                continue
            free = _free_memory() if device_memory is None else device_memory
            if line := _memory_refusal(group, options, estimates, free):
                yield line
        except ValueError as error:  # such as adapters that match no layer
            yield f"{group}: {one_line(error)}"


def memory_model(teacher: Path, backbone: BackboneOptions) -> Any:
    """Memory estimates of any recipe over this teacher, from its configs."""
    from dpdmd_pipeline.planning.memory import MemoryModel
    from dpdmd_pipeline.planning.weightless import conditioning_like

    model = backbone.load(teacher, "cpu")
    return MemoryModel(model, teacher, conditioning_like(model), backbone.guidance_scale)


def explain_out_of_memory(error: BaseException, teacher: Path, backbone: BackboneOptions, options: TrainOptions) -> str:
    """The line for a GPU that ran out of memory while training: torch's reason, the estimate and the remedies."""
    from dpdmd_pipeline.planning.remedies import describe_remedies, remedies

    estimates = memory_model(teacher, backbone)
    recipe, execution = options.recipe(), options.execution()
    reason = ". ".join(one_line(error).split(". ")[:2]).removeprefix("CUDA out of memory. ")
    return (
        f"out of GPU memory while training ({reason}); the estimate was {estimates.estimate(recipe, execution)}: "
        f"{describe_remedies(remedies(estimates, recipe, execution))}; finished cycles are kept"
    )


def describe_costs(plan: Plan, options: TrainOptions, estimates: Any | None) -> list[str]:
    """Lines for the log before a student is trained: network passes and, with estimates, FLOP and memory."""
    from dpdmd_pipeline.planning.cost import TeacherSettings, describe_cost

    steps = [level.steps for level in plan.anchors.anchor_levels[: options.anchored_steps]]
    online, steps_are_set = plan.anchors.mode == "online", None not in steps
    teacher = TeacherSettings(
        guidance_scale=plan.backbone.guidance_scale,
        online_anchors=[step for step in steps if step] if online and steps_are_set else (),
        with_denoised=plan.anchors.with_denoised,
        num_steps=plan.backbone.num_steps,
    )
    flops = estimates.forward_flops(options.recipe()) if estimates else None
    lines = describe_cost(options.recipe(), options.execution(), teacher, flops)
    if online and not steps_are_set:
        lines.append("plus the anchor passes, which the anchors stage counts")
    if estimates:
        lines.append(f"estimated GPU memory: {estimates.estimate(options.recipe(), options.execution())}")
    return lines


def _memory_refusal(group: str, options: TrainOptions, estimates: Any, free: int) -> str | None:
    """The line for a student that does not fit, with the options that save memory."""
    from dpdmd_pipeline.planning.remedies import describe_remedies, remedies

    recipe, execution = options.recipe(), options.execution()
    needed = estimates.estimate(recipe, execution)
    if needed.total <= free:
        return None
    helpful = describe_remedies(remedies(estimates, recipe, execution))
    return f"{group} needs about {needed} of GPU memory, {free / GIB:.1f} GiB are free: {helpful}"


def _free_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]
