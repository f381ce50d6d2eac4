"""Checks before anything large is read: options against the teacher, the anchors, each other and this machine.

Each `check_` function raises a ValueError that names the options, their values and the remedy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.planning.judging import option, unjudgeable
from dpdmd_pipeline.planning.messages import describe
from dpdmd_pipeline.planning.plan import Plan, make_plan
from dpdmd_pipeline.planning.teacher import unreadable_teacher
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorLevel, AnchorRecipe, Recipe
from dpdmd_pipeline.wording import differences, listed, one_line, validation_faults

Options = TypeVar("Options", TrainOptions, AnchorRecipe)


def refuse_run(pipeline: Any, catalog: Any, arguments: str = "") -> list[str]:
    """One line for each reason why a Kedro run cannot succeed, before its first node; for the hooks."""
    teacher = catalog.get("teacher") if "teacher" in catalog else None
    if "teacher" in pipeline.all_outputs() and hasattr(teacher, "load_configs"):
        return [f"the stage `teacher` trains embedded teachers, {teacher.model} is trained: leave the stage out"]
    try:
        checks = unreadable_teacher, unjudgeable, unfit_sizes, refused_runs
        if lines := [line for check in checks for line in check(pipeline, catalog)]:
            return lines
        plan = make_plan(pipeline, catalog)
        return refusals(plan) if plan else []
    except (ValueError, OSError) as error:
        return [describe(error, arguments)]


def refusals(plan: Plan, device_memory: int | None = None) -> list[str]:
    """One line for each reason why the run cannot succeed; empty if none is known. Logs its cost.

    Args:
        plan: of the run.
        device_memory: free bytes on the GPU; None asks the GPU, if a student is trained on one.
    """
    from dpdmd_pipeline.planning.disk import copies_too_large, full_disks, log_export_memory
    from dpdmd_pipeline.planning.gpu import students_too_large
    from dpdmd_pipeline.planning.stages import log_costs

    try:
        if lines := [*_refused_options(plan)]:
            return lines
        lines = [*students_too_large(plan, device_memory)]
        if not lines:
            log_costs(plan)
            log_export_memory(plan)
        return [*lines, *copies_too_large(plan), *full_disks(plan)]
    except (ValueError, OSError) as error:
        return [one_line(error)]


def _refused_options(plan: Plan) -> Iterator[str]:
    """Options that the teacher's config does not allow."""
    model, steps, first = plan.model, plan.backbone.num_steps, None
    try:
        if plan.trained or "anchors" in plan.folders:
            first = anchor_steps(plan.anchors, model, steps)[0]
    except ValueError as error:
        yield one_line(error)
    for group, options in plan.trained.items():
        try:
            if group not in plan.finished:  # a published student is reused on any machine
                check_arithmetic(plan.backbone, options)
                check_speed(plan.teacher, options)
                check_optimizers(options)
                check_base_weights(options)
                check_trackers(options)
            check_backbone(plan.backbone, options)
            check_start(plan.teacher, plan.backbone, options)
            check_recipe(plan.anchors, options)
            levels = model.student_schedule(options.grid, options.num_steps)
            if options.anchored_steps and first is not None:
                _check_start(levels.sigma[0].item(), model.schedule(steps).sigma[first].item())
        except ValueError as error:
            yield f"{group}: {one_line(error)}"


def unfit_sizes(pipeline: Any, catalog: Any) -> Iterator[str]:
    """One line if `sample.size` does not fit the teacher."""
    size = option(catalog, "sample", "size") if "params:sample" in pipeline.inputs() else None
    if size:
        teacher = catalog.get("teacher")
        folder = teacher.load_configs() if hasattr(teacher, "load_configs") else teacher.load()
        try:
            BackboneOptions.model_validate(catalog.get("params:backbone").load()).load(folder, "cpu").at(tuple(size))
        except ValueError as error:
            yield f"sample.{one_line(error)}"


def refused_runs(pipeline: Any, catalog: Any) -> Iterator[str]:
    """One line for each recipe of a study whose changes cannot work."""
    for name in sorted(pipeline.inputs()):
        study = catalog.get(name).load() if name.startswith("params:") and name in catalog else None
        for run, changes in getattr(study, "active_runs", {}).items():
            try:
                train, anchors = (catalog.get(f"params:{group}").load() for group in ("train", "anchors"))
                train, anchors = changed_options(train, anchors, changes)
                check_recipe(anchors, train)
                check_optimizers(train)
                check_base_weights(train)
            except ValueError as error:
                yield f"{name.removeprefix('params:')}.runs.{run}: {one_line(error)}"


def changed_options(train: TrainOptions, anchors: AnchorRecipe, run: Any) -> tuple[TrainOptions, AnchorRecipe]:
    """Options of one recipe of a study; own anchors are drawn online, which alone changes a student.

    Raises:
        ValueError: if a change is invalid, or leaves a teacher start no step of the student.
    """
    train = _with_changes("train", train, run.train)
    if run.anchors:
        anchors = _with_changes("anchors", anchors, {"mode": "online", **run.anchors})
    if run.teacher_start:
        run.teacher_start.check_landing(train.num_steps)
    return train, anchors


def _with_changes(group: str, options: Options, changes: dict[str, Any]) -> Options:
    try:
        return type(options)(**{**options.model_dump(), **changes})
    except ValidationError as error:
        raise ValueError(f"{group}: {validation_faults(error)}") from error


def anchor_steps(options: AnchorRecipe, model: Any, num_steps: int) -> list[int]:
    """Numbers K of teacher steps that reach the anchor levels."""
    steps = [_teacher_steps(level, model, num_steps) for level in options.anchor_levels]
    if steps != sorted(set(steps)):
        raise ValueError(
            f"anchors.anchor_levels give teacher steps {steps}: order them from noisy to clean, without repetition"
        )
    return steps


def _teacher_steps(level: AnchorLevel, model: Any, num_steps: int) -> int:
    if level.steps is not None:
        if level.steps >= num_steps:
            raise ValueError(
                f"anchors.anchor_levels steps={level.steps} must be below the teacher's backbone.num_steps={num_steps}"
            )
        return level.steps
    if num_steps < 2:
        raise ValueError(f"backbone.num_steps={num_steps} leaves no level for an anchor: set at least 2")
    sigmas, sigma = _family_sigmas(model.schedule(num_steps), model.prediction), level.sigma
    if level.first_step is not None:
        student = model.student_schedule(level.first_step.grid, level.first_step.num_steps)
        sigma = _family_sigmas(student, model.prediction)[1]
    if not 0 < sigma < sigmas[0]:
        raise ValueError(f"anchors.anchor_levels sigma={sigma:g} must lie below the teacher's start, {sigmas[0]:g}")
    return min(range(1, num_steps), key=lambda step: abs(sigmas[step] - sigma))


def _family_sigmas(levels: Any, prediction: str) -> list[float]:
    """Noise levels in the units of a family: flow's sigma, or sigma / alpha of a diffusion model."""
    return (levels.sigma if prediction == "flow" else levels.sigma / levels.alpha).tolist()


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
    from dpdmd_pipeline.backbones import network_folder
    from dpdmd_pipeline.datasets.model_folder import folder_hash
    from dpdmd_pipeline.datasets.sharded import fingerprint

    model = backbone.load(teacher, "cpu")
    manifest = anchors.manifest
    current = {
        "anchors": options.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "backbone": {name: getattr(backbone, name) for name in manifest.get("backbone", {})},
        "teacher": folder_hash(network_folder(teacher)),
        "teacher_sigmas": model.schedule(backbone.num_steps).sigma.tolist(),
        "embeddings": embeddings.fingerprint,
        "rows": fingerprint(list(rows)),
    }
    recorded = {"backbone": {}, **manifest, "anchors": manifest["options"]}
    if changes := [*differences({name: recorded.get(name) for name in current}, current)]:
        fact = f"the anchors were made with {listed(changes, 3, '; ')}; set that back or make them again"
        raise StageError(fact, stage="anchors")
    check_recipe(options, recipe)
    if recipe.anchored_steps:
        levels = model.student_schedule(recipe.grid, recipe.num_steps)
        _check_start(levels.sigma[0].item(), manifest["anchor_sigmas"][0])


def _check_start(start: float, anchor: float) -> None:
    """Check that the first anchor's sigma is below that of the student's start."""
    if not anchor < start:
        raise ValueError(
            f"the first of anchors.anchor_levels is at sigma {anchor:.4g}, train.grid starts at {start:.4g}: "
            "the anchor must be below the start: take a later anchor, or start the grid higher"
        )


def check_recipe(options: AnchorRecipe, recipe: Recipe) -> None:
    """Check that the anchors have the recipe's levels, enough of them, and the x0 of tangent targets."""
    if not recipe.anchored_steps:
        return
    for level in options.anchor_levels:
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
    if recipe.target == "tangent" and not options.with_denoised:
        raise ValueError("train.target=tangent needs the teacher's x0 at the anchor: set anchors.with_denoised=true")


def check_backbone(backbone: BackboneOptions, recipe: Recipe) -> None:
    """Check that teacher and trained networks compute in one precision, and that a guidance interval has guidance."""
    if backbone.dtype != recipe.precision:
        raise ValueError(
            f"backbone.dtype={backbone.dtype} and train.precision={recipe.precision} differ: "
            "the teacher and the networks it trains work in one precision, float32 or bfloat16"
        )
    if backbone.guidance_scale == 1 and recipe.guidance_interval != (0.0, 1.0):
        raise ValueError(
            f"train.guidance_interval={list(recipe.guidance_interval)} needs a guided teacher, "
            "backbone.guidance_scale=1 has no guidance: set guidance_interval=[0.0, 1.0]"
        )


def check_arithmetic(backbone: BackboneOptions, options: TrainOptions) -> None:
    """Check that the device exists and, if it is a GPU, that it computes in bfloat16 where the options need that."""
    import torch

    uses_bfloat16 = "bfloat16" in (options.precision, backbone.dtype, backbone.teacher_dtype)
    if resolve_device(options.device).type != "cuda" or not uses_bfloat16:
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError(
            f"train.precision={options.precision}: {torch.cuda.get_device_name()} has no bfloat16: take a GPU of "
            "compute capability 8.0 or newer, or set train.precision=float32 and backbone.dtype=float32"
        )


def check_start(teacher: Path, backbone: BackboneOptions, recipe: Recipe) -> None:
    """Check that the weights of a warm start fit the network and the recipe's roles."""
    if not recipe.start_from:
        return
    import torch

    from dpdmd_pipeline.backbones.start import load_start
    from dpdmd_pipeline.planning.weightless import weightless
    from dpdmd_pipeline.training.roles import check_room, lora_roles

    model = backbone.load(teacher, "cpu")
    start = load_start(Path(recipe.start_from), model, backbone.family)
    if recipe.roles == "lora":
        with torch.device("meta"):
            roles = lora_roles(weightless(model, teacher), recipe.lora, seed=0, gradient_checkpointing=False)
        for view in (roles.student, roles.fake_score)[: 1 if recipe.fake_score_from == "teacher" else 2]:
            check_room(start, view.adapter_state(), f"lora.{view.adapter}_rank")


def check_speed(teacher: Path, options: TrainOptions) -> None:
    """Check that this machine can compile, and that the network has convolutions, if the options need it."""
    from dpdmd_pipeline.planning.weightless import network_class
    from dpdmd_pipeline.training.speed import refuse_channels_last, refuse_missing_compiler

    if options.compile != "none":
        refuse_missing_compiler(resolve_device(options.device))
    if options.channels_last:
        refuse_channels_last(network_class(teacher))


def check_optimizers(options: TrainOptions) -> None:
    """Check that this machine has what 8-bit moments need, if an optimizer uses them."""
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


def check_base_weights(options: TrainOptions) -> None:
    """Check that torchao is installed, if the base of the adapters is to be stored in fewer bits."""
    if options.lora.base_weights != "as_teacher" and find_spec("torchao") is None:
        raise ValueError(
            f"lora.base_weights={options.lora.base_weights} needs torchao, which is not installed: "
            '`pip install "dpdmd-pipeline[quant]"`, or set base_weights=as_teacher'
        )


def check_trackers(options: TrainOptions) -> None:
    """Check that the programs that follow the training are installed, and that Weights & Biases has a login."""
    for name in options.track:
        if find_spec(name) is None:
            raise ValueError(f"track has {name}, which is not installed: `pip install {name}`, or leave it out")
    if "wandb" in options.track and not _has_wandb_login():
        raise ValueError("track has wandb, which has no login: run `wandb login`, or set WANDB_MODE=offline")


def _has_wandb_login() -> bool:
    from netrc import NetrcParseError, netrc

    if "WANDB_API_KEY" in os.environ or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return True
    try:
        return any("wandb" in host for host in netrc(os.environ.get("NETRC")).hosts)
    except (OSError, NetrcParseError):
        return False
