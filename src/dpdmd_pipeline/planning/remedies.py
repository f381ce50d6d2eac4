"""Options that make a run smaller, with the memory that each of them saves."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

from dpdmd_pipeline.planning.memory import GIB, MemoryModel
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.recipe import Recipe

_TRAINED = ("student", "fake_score")
_MICRO_BATCHES = ("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")


def remedies(model: MemoryModel, recipe: Recipe, execution: Execution) -> list[tuple[str, int]]:
    """Options, and the bytes that each saves by itself; the most helpful first."""
    now = model.estimate(recipe, execution).total
    totals = {text: model.estimate(*changed).total for text, changed in _smaller(recipe, execution).items()}
    helpful = [(text, now - total) for text, total in totals.items() if total < 0.99 * now]
    return sorted(helpful, key=lambda remedy: -remedy[1])


def describe_remedies(options: Iterable[tuple[str, int]]) -> str:
    """One phrase: each option with the memory it saves."""
    phrases = [f"{text} saves {saved / GIB:.1f} GiB" for text, saved in options]
    return "; ".join(phrases) or "no option makes it smaller: take a card with more memory"


def _smaller(recipe: Recipe, execution: Execution) -> dict[str, tuple[Recipe, Execution]]:
    """Changes to try, by their description."""
    execution = execution.fitted_to(recipe.batch_size)
    changed: dict[str, tuple[Recipe, Execution]] = {}
    sizes = {name: getattr(execution, name) // 2 for name in _MICRO_BATCHES if getattr(execution, name) > 1}
    if sizes:
        halved = ", ".join(f"train.{name}={size}" for name, size in sizes.items())
        changed[halved] = (recipe, execution.model_copy(update=sizes))
    for text, update in {
        "train.gradient_checkpointing=true": {"gradient_checkpointing": True},
        "train.guidance_batch=apart": {"guidance_batch": "apart"},
    }.items():
        changed[text] = (recipe, execution.model_copy(update=update))
    changed["train.ema=0"] = (recipe.model_copy(update={"ema": 0.0}), execution)
    unsharded, also = _with_sharding(execution, "none"), ", train.launch.sharding=none" if execution.sharded else ""
    kinds = {role: getattr(recipe, role).model_copy(update={"kind": "adamw_8bit"}) for role in _TRAINED}
    eight_bits = f"kind=adamw_8bit for both optimizers{_to_install('bitsandbytes')}"
    changed[f"{eight_bits}{also}"] = (recipe.model_copy(update=kinds), unsharded)
    changed[f"train.roles=lora{also}"] = (recipe.model_copy(update={"roles": "lora"}), unsharded)
    if execution.launch.total > 1 and _can_be_sharded(recipe):
        changed["train.launch.sharding=fsdp2"] = (recipe, _with_sharding(execution, "fsdp2"))
    if recipe.stop_gradient or not recipe.anchored_steps:
        changed["train.graded_steps=random"] = (recipe.model_copy(update={"graded_steps": "random"}), execution)
    return changed


def _with_sharding(execution: Execution, sharding: str) -> Execution:
    launch = execution.launch.model_copy(update={"sharding": sharding})
    return execution.model_copy(update={"launch": launch})


def _to_install(package: str) -> str:
    return f" (first `pip install {package}`)" if find_spec(package) is None else ""


def _can_be_sharded(recipe: Recipe) -> bool:
    return recipe.roles == "full" and all(getattr(recipe, role).kind == "adamw" for role in _TRAINED)
