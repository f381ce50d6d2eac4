"""What is found out before anything large is read: options that do not fit the teacher, room that is short."""

import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.planning.checks import (
    check_guidance,
    check_optimizers,
    check_precision,
    check_recipe,
    check_speed,
    check_start,
)
from dpdmd_pipeline.planning.messages import describe as describe_error
from dpdmd_pipeline.planning.reuse import Known, own_caches, read_prompts, size_of, state_folders
from dpdmd_pipeline.publishing import Folders
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe
from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)

GIB = 2**30


@dataclass(frozen=True)
class Planned:
    """What a run is going to make.

    Attributes:
        teacher: its folder, of which only the configs need be there.
        backbone, anchors: options.
        trained: options of each student, by their group.
        prompts: all, and those trained on; None where they are not known.
        folders: of `embeddings`, `anchors` and `train_state`, as far as the run writes them.
        made: caches that are published and this run's.
        states: folders of the states that the students go on from, by their group, where they are known.
    """

    teacher: Path
    backbone: BackboneOptions
    anchors: AnchorRecipe
    trained: Mapping[str, TrainOptions]
    prompts: tuple[int, int] | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    made: frozenset[str] = frozenset()
    states: Mapping[str, Path] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        """The teacher's adapter.

        Raises:
            ValueError, OSError: if the folder does not fit the options.
        """
        return self.backbone.load(self.teacher, "cpu")

    @cached_property
    def estimates(self) -> Any:
        """Of the memory of any recipe over this teacher."""
        return memory_model(self.teacher, self.backbone)


def refusals(plan: Planned, device_memory: int | None = None) -> list[str]:
    """One line for each thing that cannot go well; empty if nothing is known against the run. Logs what it will cost.

    Args:
        plan: the run.
        device_memory: bytes that are free on the GPU; None asks the GPU itself, where a student is trained on one.
    """
    try:
        lines = [*_refused_options(plan)]
    except (ValueError, OSError) as error:
        return [one_line(error)]
    return lines or [*_short_of_memory(plan, device_memory), *_short_of_disk(plan)]


def _refused_options(plan: Planned) -> Iterator[str]:
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


def _check_levels(plan: Planned, model: Any, options: TrainOptions) -> None:
    """The student's schedule can be made, and its first anchor lies below its start."""
    levels = model.student_schedule(options.grid, options.num_steps)
    steps = plan.anchors.anchor_levels[0].steps
    if options.anchored_steps and steps is not None and steps < plan.backbone.num_steps:
        check_start(levels.sigma[0].item(), model.schedule(plan.backbone.num_steps).sigma[steps].item())


# ---- memory


def _short_of_memory(plan: Planned, device_memory: int | None) -> Iterator[str]:
    """Students that do not fit on the GPU; logs what each costs."""
    for group, options in plan.trained.items():
        on_gpu = device_memory is not None or resolve_device(options.device).type == "cuda"
        try:
            estimates = plan.estimates if on_gpu else None
            for line in describe(plan, options, estimates):
                log.info("%s", line)
            if estimates is None:
                continue
            free = _free_memory() if device_memory is None else device_memory
            if line := refuse_memory(group, options, estimates, free):
                yield line
        except ValueError as error:  # as of adapters that match no layer
            yield f"{group}: {one_line(error)}"


def memory_model(teacher: Path, backbone: BackboneOptions) -> Any:
    """Estimates of the memory of any recipe over this teacher, from its configs."""
    from dpdmd_pipeline.planning.memory import MemoryModel
    from dpdmd_pipeline.planning.weightless import conditioning_like

    model = backbone.load(teacher, "cpu")
    return MemoryModel(model, teacher, conditioning_like(model), backbone.guidance_scale)


def refuse_memory(group: str, options: TrainOptions, estimates: Any, free: int) -> str | None:
    """The line for a student that does not fit, with what would help and by how much."""
    from dpdmd_pipeline.planning.remedies import describe_remedies, remedies

    recipe, execution = options.recipe(), options.execution()
    needed = estimates.estimate(recipe, execution)
    if needed.total <= free:
        return None
    helpful = describe_remedies(remedies(estimates, recipe, execution))
    return f"{group} needs about {needed} of GPU memory, {free / GIB:.1f} GiB are free: {helpful}"


def explain_out_of_memory(error: BaseException, teacher: Path, backbone: BackboneOptions, options: TrainOptions) -> str:
    """The line for a GPU that ran out of memory while training: what was asked for, and which options make it less.

    Args:
        error: torch's.
        teacher, backbone, options: of the run.
    """
    from dpdmd_pipeline.planning.remedies import describe_remedies, remedies

    estimates = memory_model(teacher, backbone)
    recipe, execution = options.recipe(), options.execution()
    asked = one_line(error).split(". ")
    words = ". ".join(asked[:2]).removeprefix("CUDA out of memory. ")
    return (
        f"out of GPU memory while training ({words}); the estimate was {estimates.estimate(recipe, execution)}: "
        f"{describe_remedies(remedies(estimates, recipe, execution))}; finished steps are kept"
    )


def _free_memory() -> int:
    import torch

    return torch.cuda.mem_get_info()[0]


def describe(plan: Planned, options: TrainOptions, estimates: Any | None) -> list[str]:
    """Lines for the log before a student is trained: its passes, and, on a GPU, its work and memory."""
    from dpdmd_pipeline.planning.cost import TeacherSettings, describe_cost

    steps = [level.steps for level in plan.anchors.anchor_levels[: options.anchored_steps]]
    online, known = plan.anchors.mode == "online", None not in steps
    teacher = TeacherSettings(
        guidance_scale=plan.backbone.guidance_scale,
        online_anchors=[step for step in steps if step] if online and known else (),
        with_denoised=plan.anchors.with_denoised,
        num_steps=plan.backbone.num_steps,
    )
    flops = estimates.forward_flops(options.recipe()) if estimates else None
    lines = describe_cost(options.recipe(), options.execution(), teacher, flops)
    if online and not known:
        lines.append("to these come the anchors' own passes: the stage anchors finds out how many")
    if estimates:
        lines.append(f"estimated GPU memory: {estimates.estimate(options.recipe(), options.execution())}")
    return lines


# ---- disk


def _short_of_disk(plan: Planned) -> Iterator[str]:
    """Disks on which the caches do not fit together; what this run takes up of what is there needs no new room."""
    needs = {name: size for name, size in disk_needs(plan).items() if name in plan.folders}
    disks: dict[int, list[str]] = {}
    for name in needs:
        disks.setdefault(_standing(plan.folders[name]).stat().st_dev, []).append(name)
    for names in disks.values():
        place = _standing(plan.folders[names[0]])
        missing = {name: _missing(plan, name, needs[name]) for name in names}
        free = shutil.disk_usage(place).free
        if sum(missing.values()) > GIB:
            log.info("disk: %s; %.1f GiB are free on the disk of %s", _sizes(missing), free / GIB, place)
        if sum(missing.values()) > free:
            room = f"{_sizes(missing)} are needed, {free / GIB:.1f} GiB are free"
            yield f"disk of {place}: {room}: {_spare_disk(plan, missing)}"


def disk_needs(plan: Planned) -> dict[str, int]:
    """Bytes of the caches and of a student's states, as far as they are known."""
    import torch

    from dpdmd_pipeline.planning.disk import anchor_bytes, embedding_bytes
    from dpdmd_pipeline.planning.weightless import conditioning_like

    needs = {}
    if plan.prompts is not None:
        needs["embeddings"] = embedding_bytes(conditioning_like(plan.model), plan.prompts[0])
        if plan.anchors.mode == "cached":
            needs["anchors"] = anchor_bytes(
                plan.model.latent_shape,
                plan.prompts[1] * plan.anchors.seeds_per_prompt,
                len(plan.anchors.anchor_levels),
                with_denoised=plan.anchors.with_denoised,
                dtype=getattr(torch, plan.anchors.dtype),
            )
    if plan.trained and "train_state" in plan.folders:
        needs["train_state"] = max(_states_need(plan, options) for options in plan.trained.values())
    return needs


def _states_need(plan: Planned, options: TrainOptions) -> int:
    """Bytes of a student's states: those that are kept, and the one being written."""
    return (options.keep_last + 1) * plan.estimates.checkpoint_bytes(options.recipe())


def _missing(plan: Planned, name: str, need: int) -> int:
    """Bytes that are yet to be written. Another run's cache stays in its place until this one's is whole."""
    if name == "train_state":
        return max(_states_missing(plan, group, options) for group, options in plan.trained.items())
    if name in plan.made:
        return 0
    # What is unfinished is gone on with, or deleted before the first shard is written
    return max(0, need - size_of(Folders.of(plan.folders[name]).partial))


def _states_missing(plan: Planned, group: str, options: TrainOptions) -> int:
    from dpdmd_pipeline.training.checkpoint import Checkpoints

    need = _states_need(plan, options)
    if group not in plan.states:
        return need
    finished = Checkpoints(plan.states[group]).holds(options.max_steps)
    return 0 if finished else max(0, need - size_of(plan.states[group]))


def _spare_disk(plan: Planned, missing: Mapping[str, int]) -> str:
    """What would make the largest of them smaller, and by how much."""
    halves = {
        "embeddings": "half as many prompts",
        "anchors": "half the anchors.seeds_per_prompt",
        "train_state": "train.roles=lora, or another disk for data/06_models",
    }
    found = []
    for name, size in sorted(missing.items(), key=lambda item: -item[1]):
        if name == "train_state":
            found.append(halves[name])
        elif size:
            found.append(f"{halves[name]} spare {size / 2 / GIB:.1f} GiB")
    if missing.get("anchors") and plan.anchors.dtype == "float32":
        found.append(f"anchors.dtype=float16 spares {missing['anchors'] / 2 / GIB:.1f} GiB")
    if missing.get("anchors"):
        found.append(f"anchors.mode=online spares {missing['anchors'] / GIB:.1f} GiB")
    return "free some space, or: " + "; ".join(found)


def _sizes(needs: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in needs.items())


def _standing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    folder = folder.resolve()
    return next(place for place in (folder, *folder.parents) if place.exists())


# ---- of a Kedro run


def refuse_run(pipeline: Any, catalog: Any, env: str | None = None) -> list[str]:
    """What stands against a run of the line, before its first node; for the hooks.

    Nothing is looked at in runs that neither make anchors nor train the two students: not in `study` and `beyond`
    either, whose node holds its many students against the anchors before it trains the first.
    """
    nodes = {node.name: node for node in pipeline.nodes}
    trained = {
        group: TrainOptions.model_validate(catalog.get(f"params:{group}").load())
        for name, group in (("train_dmd", "train_dmd"), ("train_student", "train"))
        if name in nodes
    }
    teacher = catalog.get("teacher") if "teacher" in catalog else None
    pretrained = hasattr(teacher, "load_configs")
    if "teacher" in pipeline.all_outputs() and pretrained:
        return [f"the stage `teacher` trains embedded teachers, {teacher.model} is trained: leave it out"]
    if not (trained or "make_anchors" in nodes) or teacher is None:
        return []
    try:
        folder = teacher.load_configs() if pretrained else teacher.load()
        known = _written_prompts(pipeline, catalog)
        plan = Planned(
            teacher=folder,
            backbone=BackboneOptions.model_validate(catalog.get("params:backbone").load()),
            anchors=AnchorRecipe.model_validate(catalog.get("params:anchors").load()),
            trained=trained,
            prompts=_count_prompts(pipeline, catalog, known),
            folders=_folders(pipeline, catalog, estimated=pretrained),
        )
        return refusals(plan if known is None else _with_what_is_there(plan, catalog, known))
    except (ValueError, OSError) as error:
        return [describe_error(error, env)]


def _written_prompts(pipeline: Any, catalog: Any) -> Known | None:
    """The prompts; where they are cleaned anew, those of the last time, unless a file has changed since."""
    if not catalog.exists("prompts"):
        return None
    prompts = catalog.get("prompts").load()
    if "prompts" not in pipeline.all_outputs():
        return read_prompts(prompts)
    sources = [catalog.get(name).load().path for name in ("raw_prompts", "raw_eval_prompts")]
    written = prompts.path.stat().st_mtime
    if any(path.is_file() and path.stat().st_mtime > written for path in sources):
        return None
    try:
        return read_prompts(prompts)
    except (ValueError, OSError):  # it is going to be written anew
        return None


def _with_what_is_there(plan: Planned, catalog: Any, known: Known) -> Planned:
    """The plan with what this run takes up."""
    found = {name: _published(catalog, name) for name in ("embeddings", "anchors")}
    own = own_caches(found, known, plan.backbone, plan.anchors)
    states = {}
    if "anchors" in own and "train_state" in plan.folders:
        states = state_folders(plan.folders["train_state"], plan.trained, plan.backbone, own["anchors"], known.rows)
    return replace(plan, made=frozenset(own), states=states)


def _published(catalog: Any, name: str) -> Any | None:
    """A cache that is there and whole."""
    from kedro.io import DatasetError

    try:
        return catalog.get(name).load() if catalog.exists(name) else None
    except DatasetError:  # a damaged one: the stage that writes it says so
        return None


def _count_prompts(pipeline: Any, catalog: Any, known: Known | None) -> tuple[int, int] | None:
    """All prompts, and those trained on; of files that are yet to be cleaned at most so many."""
    if "prompts" not in pipeline.all_outputs():
        return None if known is None else (known.total, len(known.rows))
    trained = _filled(catalog.get("raw_prompts").load())
    judged = catalog.get("raw_eval_prompts").load()
    return trained + (_filled(judged) if judged.path.is_file() else 0), trained


def _filled(prompts: Any) -> int:
    return sum(1 for line in prompts.lines() if line.text.strip())


def _folders(pipeline: Any, catalog: Any, *, estimated: bool) -> dict[str, Path]:
    """Where the run writes what is large; states of embedded students are not."""
    made = pipeline.all_outputs()
    names = [name for name in ("embeddings", "anchors") if name in made]
    if estimated and made & {"student", "student_dmd"}:
        names.append("train_state")
    return {name: Path(catalog.get(name)._filepath) for name in names}
