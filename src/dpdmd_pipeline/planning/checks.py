"""What is refused before a student is trained: anchors of another teacher, schedule, split or recipe."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
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
    """Hold the anchors' manifest against what is asked for now.

    Raises:
        ValueError: names what differs, both values, and the remedy.
    """
    from dpdmd_pipeline.datasets.model_folder import folder_hash
    from dpdmd_pipeline.datasets.sharded import fingerprint
    from dpdmd_pipeline.planning.identity import network_folder

    model = backbone.load(teacher, "cpu")
    manifest = anchors.manifest
    kept = ("teacher", "teacher_sigmas", "embeddings", "rows")
    then = {
        **{f"anchors.{name}": value for name, value in manifest["options"].items()},
        **{f"backbone.{name}": value for name, value in manifest.get("backbone", {}).items()},
        **{name: manifest.get(name) for name in kept},
    }
    now = {
        **{f"anchors.{name}": value for name, value in _asked(options).items()},
        **{f"backbone.{name}": getattr(backbone, name) for name in manifest.get("backbone", {})},
        "teacher": folder_hash(network_folder(teacher)),
        "teacher_sigmas": model.schedule(backbone.num_steps).sigma.tolist(),
        "embeddings": embeddings.fingerprint,
        "rows": fingerprint(list(rows)),
    }
    for name in now:
        if now[name] != then.get(name):
            raise ValueError(
                f"the anchors were made with {name}={_short(then.get(name))}, this run has {_short(now[name])}: "
                "run `kedro run --pipelines anchors` again, or set the value back"
            )
    check_recipe(options, recipe)
    if recipe.anchored_steps:
        levels = model.student_schedule(recipe.grid, recipe.num_steps)
        check_start(levels.sigma[0].item(), manifest["anchor_sigmas"][0])


def check_precision(backbone: BackboneOptions, recipe: Recipe) -> None:
    """Networks of one run work in one precision.

    Raises:
        ValueError: names both values.
    """
    if backbone.dtype != recipe.precision:
        raise ValueError(
            f"backbone.dtype={backbone.dtype} and train.precision={recipe.precision} differ: "
            "the teacher and the networks it trains work in one precision, float32 or bfloat16"
        )


def check_guidance(backbone: BackboneOptions, recipe: Recipe) -> None:
    """An interval of guidance needs guidance.

    Raises:
        ValueError: names both values.
    """
    if backbone.guidance_scale == 1 and recipe.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"train.guidance_interval={list(recipe.guidance_interval)} says where the teacher is guided, and "
            "backbone.guidance_scale=1 that it is not: set guidance_interval=[0.0, 1.0]"
        )


def check_speed(teacher: Path, options: TrainOptions) -> None:
    """What the options ask for can be had on this machine and of this network.

    Raises:
        ValueError: names the option and what is missing.
    """
    from dpdmd_pipeline.planning.weightless import network_class
    from dpdmd_pipeline.training.speed import refuse_channels_last, refuse_missing_compiler

    if options.compile != "none":
        refuse_missing_compiler(resolve_device(options.device))
    if options.channels_last:
        refuse_channels_last(network_class(teacher))


def check_optimizers(options: TrainOptions) -> None:
    """8-bit moments can be had on this machine, where they are asked for.

    Raises:
        ValueError: names the optimizers and what is missing.
    """
    asked = [role for role in ("student", "fake_score") if getattr(options, role).kind == "adamw_8bit"]
    if not asked:
        return
    kinds = " and ".join(f"{role}.kind=adamw_8bit" for role in asked)
    if (device := resolve_device(options.device)).type != "cuda":
        raise ValueError(f"{kinds}: 8-bit moments need a CUDA device, this student trains on {device}: set kind=adamw")
    if find_spec("bitsandbytes") is None:
        raise ValueError(
            f"{kinds}: 8-bit moments need bitsandbytes, which is not installed: `pip install bitsandbytes` "
            "(the extra `8bit` of this project), or set kind=adamw"
        )


def _asked(options: AnchorRecipe) -> dict[str, Any]:
    return options.model_dump(mode="json", exclude=NOT_IN_THE_RESULT)


def _short(value: Any) -> str:
    """A hash by its first digits; a schedule by its first levels."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:40]}..."


def check_start(start: float, anchor: float) -> None:
    """The first anchor is less noisy than what the student begins with: its one step leads there.

    Args:
        start, anchor: their sigmas.

    Raises:
        ValueError: names both.
    """
    if not anchor < start:
        raise ValueError(
            f"the first of anchors.anchor_levels is at sigma {anchor:.4g}, train.grid starts at {start:.4g}: "
            "an anchor lies below the start; take a later anchor or start the grid higher"
        )


def check_recipe(options: AnchorRecipe, recipe: Recipe) -> None:
    """The anchors have what the student's recipe asks of them: its levels, enough of them, and the tangent's x0.

    Args:
        options: that the anchors are made with.
        recipe: of the student.

    Raises:
        ValueError: names what is missing or differs, both values, and the remedy.
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
        raise ValueError(
            "train.target=tangent needs anchors.with_denoised=true: the teacher's x0 at the anchor is not stored"
        )
