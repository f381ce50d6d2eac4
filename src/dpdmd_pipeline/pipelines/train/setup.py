"""Set up a student's training from its inputs and options, in one process or in each of several.

The identity of a student hashes this module and everything that it imports (planning/identity.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.training.options import TrainOptions

if TYPE_CHECKING:
    from dpdmd_pipeline.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Job:
    """Inputs and options of one student; pickled for other processes, so files are given by their paths."""

    rows: list[int]  # of the training prompts
    embeddings: Any
    anchors: Any
    teacher: Path
    backbone: BackboneOptions
    options: TrainOptions
    checkpoints: Checkpoints


def start(job: Job) -> tuple[Any, Iterator[dict]]:
    """Roles, and the records of the new cycles; training happens while these are consumed."""
    from dpdmd_pipeline.backbones.start import load_start
    from dpdmd_pipeline.training.distill import distill
    from dpdmd_pipeline.training.roles import make_roles

    backbone, options, execution = job.backbone, job.options, job.options.execution().fitted_to(job.options.batch_size)
    model, recipe = backbone.load(job.teacher, options.device), options.recipe()
    of_teacher = backbone.load_teacher(job.teacher, options.device) if recipe.roles == "full" else model
    # A checkpoint replaces all trained weights
    path = None if job.checkpoints.latest() else recipe.start_from
    roles = make_roles(
        model,
        recipe,
        gradient_checkpointing=options.gradient_checkpointing,
        sharded=options.sharded,
        of_teacher=of_teacher,
        start=load_start(Path(path), model, backbone.family) if path else None,
    )
    data, *others = [_data(job, of_teacher.at(size), roles.teacher, number) for number, size in enumerate(model.sizes)]
    adapters = [model.at(size) for size in model.sizes[1:]]
    data = replace(data, other_sizes=[*zip(adapters, others, strict=True)])
    return roles, distill(model, roles, data, recipe, job.checkpoints, execution)


def _data(job: Job, model: Any, teacher: Any, number: int) -> Any:
    """Prompts, anchors and levels of one picture size, by its number, the teacher's adapter and its network."""
    from dpdmd_pipeline.training.run import TrainingData

    levels = model.schedule(job.backbone.num_steps)
    steps = job.anchors.manifest["anchor_steps"][: job.options.anchored_steps]
    return TrainingData(
        embeddings=job.embeddings,
        prompts=job.rows,
        draw_anchors=_draw_anchors(job, model, teacher, number),
        anchor_levels=[levels[step] for step in steps],
        teacher_levels=levels,
        guidance_scale=job.backbone.guidance_scale,
        of_teacher=model,
    )


def _draw_anchors(job: Job, model: Any, teacher: Any, number: int) -> Callable:
    """Source of the student updates' samples of one picture size: the cache, or the teacher at each update."""
    from dpdmd_pipeline.training.anchors import CachedAnchors, OnlineAnchors, TeacherAnchors

    options, manifest = job.options, job.anchors.manifest
    shared = {"seed": options.seed, "anchored_steps": options.anchored_steps}
    if manifest["options"]["mode"] == "cached":
        ends = [0, *accumulate(manifest.get("rows_by_size", [len(job.anchors)]))]
        part, sizes = range(ends[number], ends[number + 1]), len(ends) - 1
        batch_size = options.batch_size
        return CachedAnchors(job.anchors, model.latent_shape, batch_size=batch_size, part=part, sizes=sizes, **shared)
    anchors = TeacherAnchors(
        model,
        teacher,
        job.embeddings,
        num_steps=job.backbone.num_steps,
        guidance_scale=job.backbone.guidance_scale,
        anchor_steps=manifest["anchor_steps"][: max(1, options.anchored_steps)],
        with_denoised=manifest["options"]["with_denoised"],
        guidance_batch=options.guidance_batch,
    )
    return OnlineAnchors(anchors, job.rows, **shared)
