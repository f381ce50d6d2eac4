"""GPU memory: check before a student is trained, options that save memory, message for a GPU that runs out of it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.planning.memory import GIB, MemoryModel, memory_model
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.training.options import MICRO_BATCHES, Execution, TrainOptions
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)

_TRAINED = ("student", "fake_score")


def students_too_large(plan: Plan, device_memory: int | None) -> Iterator[str]:
    """One line for each student to train that does not fit on the GPU; logs the estimates.

    Args:
        plan: of the run.
        device_memory: free bytes on the GPU; None takes train.card_gib, or asks the GPU that a student is trained on.
    """
    for group, options in plan.trained.items():
        if group in plan.finished:
            continue
        try:
            free = planned_memory(options) if device_memory is None else device_memory
            if free is None:
                continue
            options = with_micro_batches(plan.estimates, options, free)
            needed = plan.estimates.estimate(options.recipe(), options.execution())
        except ValueError as error:  # such as adapters that match no layer
            yield f"{group}: {one_line(error)}"
            continue
        log.info("%s: estimated GPU memory: %s", group, needed)
        if needed.total > free:
            helpful = describe_remedies(remedies(plan.estimates, options.recipe(), options.execution()))
            source = "are free" if options.card_gib is None else f"has the card of train.card_gib={options.card_gib:g}"
            yield f"{group} needs about {needed} of GPU memory, {free / GIB:.1f} GiB {source}: {helpful}"


def planned_memory(options: TrainOptions) -> int | None:
    """Bytes of GPU memory for each process of a training: train.card_gib, or what is free; None on a CPU."""
    free = None
    if resolve_device(options.device).type == "cuda":
        torch.cuda.empty_cache()  # what finished stages left in this process
        free = torch.cuda.mem_get_info()[0]
        of_others = range(1, min(options.launch.processes, torch.cuda.device_count()))
        # Not `mem_get_info`, which would hold memory on each: this process does not train there
        free = min([free, *(torch.cuda.get_device_properties(number).total_memory for number in of_others)])
    if options.card_gib is None:
        return free
    if free is not None and options.card_gib * GIB > free:
        log.warning(
            "train.card_gib=%g overrides the %.1f GiB that are free on the smallest GPU: a training that needs more "
            "stops when it has used them up",
            *(options.card_gib, free / GIB),
        )
    return round(options.card_gib * GIB)


def with_micro_batches(estimates: MemoryModel, options: TrainOptions, free: int) -> TrainOptions:
    """Replace each micro-batch of `auto` by the largest that fits into the free bytes, or by 1 if none does."""
    automatic = [name for name in MICRO_BATCHES if getattr(options, name) == "auto"]
    share, recipe = options.batch_size // options.launch.total, options.recipe()
    sizes = sorted({-(-share // parts) for parts in range(1, share + 1)}, reverse=True)
    options = options.model_copy(update=dict.fromkeys(automatic, 1))
    for name in automatic:
        for size in sizes:
            larger = options.model_copy(update={name: size})
            if estimates.estimate(recipe, larger.execution()).total <= free:
                options = larger
                break
    if automatic:
        chosen = ", ".join(f"train.{name}={getattr(options, name)}" for name in automatic)
        log.info("for %.1f GiB of GPU memory: %s", free / GIB, chosen)
    return options


def explain_out_of_memory(error: BaseException, teacher: Path, backbone: BackboneOptions, options: TrainOptions) -> str:
    """The line for a GPU that ran out of memory while training: torch's reason, the estimate and the remedies."""
    estimates = memory_model(teacher, backbone)
    recipe, execution = options.recipe(), options.execution()
    reason = ". ".join(one_line(error).split(". ")[:2]).removeprefix("CUDA out of memory. ")
    return (
        f"out of GPU memory while training ({reason}); the estimate was {estimates.estimate(recipe, execution)}: "
        f"{describe_remedies(remedies(estimates, recipe, execution))}; finished cycles are kept"
    )


# ---- options that save memory


def remedies(model: MemoryModel, recipe: Recipe, execution: Execution) -> list[tuple[str, int]]:
    """Options, and the bytes that each saves by itself; the most helpful first."""
    now = model.estimate(recipe, execution).total
    saved = {}
    for text, (of_recipe, of_execution) in _smaller(recipe, execution.fitted_to(recipe.batch_size)).items():
        changed = recipe.model_copy(update=of_recipe), execution.model_copy(update=of_execution)
        saved[text] = now - model.estimate(*changed).total
    helpful = [(text, size) for text, size in saved.items() if now - size < 0.99 * now]
    return sorted(helpful, key=lambda remedy: -remedy[1])


def describe_remedies(options: Iterable[tuple[str, int]]) -> str:
    """One phrase: each option with the memory it saves."""
    phrases = [f"{text} saves {saved / GIB:.1f} GiB" for text, saved in options]
    return "; ".join(phrases) or "no option makes it smaller: take a card with more memory"


def _smaller(recipe: Recipe, execution: Execution) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Changes of recipe and execution to try, by their description."""
    halved = {name: getattr(execution, name) // 2 for name in MICRO_BATCHES if getattr(execution, name) > 1}
    sharded, unsharded = (
        {"launch": execution.launch.model_copy(update={"sharding": sharding})} for sharding in ("fsdp2", "none")
    )
    kinds = {role: getattr(recipe, role).model_copy(update={"kind": "adamw_8bit"}) for role in _TRAINED}
    install = " (first `pip install bitsandbytes`)" if find_spec("bitsandbytes") is None else ""
    also = ", train.launch.sharding=none" if execution.sharded else ""
    changes: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        ", ".join(f"train.{name}={size}" for name, size in halved.items()): ({}, halved),
        "train.gradient_checkpointing=true": ({}, {"gradient_checkpointing": True}),
        "train.guidance_batch=apart": ({}, {"guidance_batch": "apart"}),
        "train.ema=0": ({"ema": 0.0}, {}),
        f"kind=adamw_8bit for both optimizers{install}{also}": (kinds, unsharded),
        f"train.roles=lora{also}": ({"roles": "lora"}, unsharded),
    }
    can_be_sharded = recipe.roles == "full" and all(getattr(recipe, role).kind == "adamw" for role in _TRAINED)
    if execution.launch.total > 1 and can_be_sharded:
        changes["train.launch.sharding=fsdp2"] = ({}, sharded)
    if recipe.stop_gradient or not recipe.anchored_steps:
        changes["train.graded_steps=random"] = ({"graded_steps": "random"}, {})
    return changes
