"""Checks before a student is trained: its anchors, its options against each other, and this machine."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe, Recipe


def check_anchors(
    anchors: Any,
    rows: Sequence[int],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: AnchorRecipe,
    recipe: Recipe,
) -> None:
    """Compare the anchors' manifest with this run.

    Raises:
        StageError: if they were made with another option, teacher, prompts or embeddings; names it and both values.
        ValueError: if the recipe needs other anchors.
    """
    from dpdmd_pipeline.datasets.model_folder import folder_hash
    from dpdmd_pipeline.datasets.sharded import fingerprint
    from dpdmd_pipeline.planning.identity import network_folder

    model = backbone.load(teacher, "cpu")
    manifest = anchors.manifest
    facts = ("teacher", "teacher_sigmas", "embeddings", "rows")
    recorded = {
        **{f"anchors.{name}": value for name, value in manifest["options"].items()},
        **{f"backbone.{name}": value for name, value in manifest.get("backbone", {}).items()},
        **{name: manifest.get(name) for name in facts},
    }
    options_dump = options.model_dump(mode="json", exclude=NOT_IN_THE_RESULT)
    current = {
        **{f"anchors.{name}": value for name, value in options_dump.items()},
        **{f"backbone.{name}": getattr(backbone, name) for name in manifest.get("backbone", {})},
        "teacher": folder_hash(network_folder(teacher)),
        "teacher_sigmas": model.schedule(backbone.num_steps).sigma.tolist(),
        "embeddings": embeddings.fingerprint,
        "rows": fingerprint(list(rows)),
    }
    for name, value in current.items():
        if value != recorded.get(name):
            raise StageError(
                f"the anchors were made with {name}={_short(recorded.get(name))}, this run has {_short(value)}; set "
                "it back or make them again",
                stage="anchors",
            )
    check_recipe(options, recipe)
    if recipe.anchored_steps:
        levels = model.student_schedule(recipe.grid, recipe.num_steps)
        check_start(levels.sigma[0].item(), manifest["anchor_sigmas"][0])


def check_precision(backbone: BackboneOptions, recipe: Recipe) -> None:
    """Check that teacher and trained networks compute in one precision.

    Raises:
        ValueError: names both values.
    """
    if backbone.dtype != recipe.precision:
        raise ValueError(
            f"backbone.dtype={backbone.dtype} and train.precision={recipe.precision} differ: "
            "the teacher and the networks it trains work in one precision, float32 or bfloat16"
        )


def check_guidance(backbone: BackboneOptions, recipe: Recipe) -> None:
    """Check that a guidance interval comes with guidance.

    Raises:
        ValueError: names both values.
    """
    if backbone.guidance_scale == 1 and recipe.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"train.guidance_interval={list(recipe.guidance_interval)} needs a guided teacher, "
            "backbone.guidance_scale=1 has no guidance: set guidance_interval=[0.0, 1.0]"
        )


def check_speed(teacher: Path, options: TrainOptions) -> None:
    """Check that this machine can compile, and that the network has convolutions, if the options need it.

    Raises:
        ValueError: names the option and the missing part.
    """
    from dpdmd_pipeline.planning.weightless import network_class
    from dpdmd_pipeline.training.speed import refuse_channels_last, refuse_missing_compiler

    if options.compile != "none":
        refuse_missing_compiler(resolve_device(options.device))
    if options.channels_last:
        refuse_channels_last(network_class(teacher))


def check_optimizers(options: TrainOptions) -> None:
    """Check that this machine has what 8-bit moments need, if an optimizer uses them.

    Raises:
        ValueError: names the optimizers and the missing part.
    """
    roles = [role for role in ("student", "fake_score") if getattr(options, role).kind == "adamw_8bit"]
    if not roles:
        return
    kinds = " and ".join(f"{role}.kind=adamw_8bit" for role in roles)
    if (device := resolve_device(options.device)).type != "cuda":
        raise ValueError(f"{kinds}: 8-bit moments need a CUDA device, this student trains on {device}: set kind=adamw")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{kinds}: 8-bit moments need bitsandbytes, which is not installed: `pip install bitsandbytes` "
            "(the extra `8bit` of this project), or set kind=adamw"
        )


def _short(value: Any) -> str:
    """Text of a value, cut after 40 characters: the first digits of a hash, the first levels of a schedule."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


def check_start(start: float, anchor: float) -> None:
    """Check that the first anchor is less noisy than the student's start.

    Args:
        start, anchor: sigmas.

    Raises:
        ValueError: names both.
    """
    if not anchor < start:
        raise ValueError(
            f"the first of anchors.anchor_levels is at sigma {anchor:.4g}, train.grid starts at {start:.4g}: "
            "the anchor must be below the start: take a later anchor, or start the grid higher"
        )


def check_recipe(options: AnchorRecipe, recipe: Recipe) -> None:
    """Check that the anchors have the recipe's levels, enough of them, and the x0 of tangent targets.

    Args:
        options: of the anchors.
        recipe: of the student.

    Raises:
        ValueError: names the option, both values and the remedy.
    """
    for level in options.anchor_levels if recipe.anchored_steps else ():
        student = level.first_step
        if student is not None and (student.grid, student.num_steps) != (recipe.grid, recipe.num_steps):
            raise ValueError(
                f"anchors.anchor_levels name the first step of grid={student.grid}, num_steps={student.num_steps}, "
                f"train has grid={recipe.grid}, num_steps={recipe.num_steps}: give both the same"
            )
    available = len(options.anchor_levels)
    if recipe.anchored_steps > available:
        raise ValueError(
            f"train.anchored_steps={recipe.anchored_steps} needs as many anchors.anchor_levels, there are {available}"
        )
    if recipe.anchored_steps and recipe.target == "tangent" and not options.with_denoised:
        raise ValueError("train.target=tangent needs the teacher's x0 at the anchor: set anchors.with_denoised=true")
