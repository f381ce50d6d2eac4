"""From a student's inputs and options to the loop that trains it, in the one process or in each of many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.training.options import TrainOptions

if TYPE_CHECKING:
    from dpdmd_pipeline.training.checkpoint import Checkpoints


@dataclass(frozen=True)
class Job:
    """Everything that sets up the run of a student; pickled for other processes, so files are given by their place."""

    rows: list[int]  # of the training prompts
    embeddings: Any
    anchors: Any
    teacher: Path
    backbone: BackboneOptions
    options: TrainOptions
    checkpoints: Checkpoints


def start(job: Job, resumed: tuple[int, dict] | None) -> tuple[Any, Any, Iterator[dict]]:
    """Load the networks and set up the loop; nothing is trained until its records are asked for."""
    from torch.distributed import is_initialized

    from dpdmd_pipeline.training.distill import Execution, Lessons, distill
    from dpdmd_pipeline.training.roles import make_roles

    backbone, options = job.backbone, job.options
    model, recipe = backbone.load(job.teacher, options.device), options.recipe()
    # The process that starts the others only takes up what they leave, whole.
    sharded = options.launch.sharding == "fsdp2" and is_initialized()
    roles = make_roles(model, recipe, gradient_checkpointing=options.gradient_checkpointing, sharded=sharded)
    levels = model.schedule(backbone.num_steps)
    lessons = Lessons(
        embeddings=job.embeddings,
        prompts=job.rows,
        draw_anchors=_draw_anchors(job, model, roles.teacher),
        anchor_levels=[levels[steps] for steps in job.anchors.manifest["anchor_steps"][: options.anchored_steps]],
        teacher_levels=levels,
        guidance_scale=backbone.guidance_scale,
    )
    execution = Execution(**options.model_dump(include={field.name for field in fields(Execution)}))
    return model, roles, distill(model, roles, lessons, recipe, job.checkpoints, resumed, execution)


def _draw_anchors(job: Job, model: Any, teacher: Any) -> Callable:
    """The student turn's samples: from the cache, or from the teacher as they are needed."""
    from dpdmd_pipeline.training.anchors import CachedAnchors, OnlineAnchors, TeacherAnchors

    options, manifest = job.options, job.anchors.manifest
    drawing = {"seed": options.seed, "anchored_steps": options.anchored_steps}
    if manifest["options"]["mode"] == "cached":
        return CachedAnchors(job.anchors, model.latent_shape, batch_size=options.batch_size, **drawing)
    asked = TeacherAnchors(
        model,
        teacher,
        job.embeddings,
        num_steps=job.backbone.num_steps,
        guidance_scale=job.backbone.guidance_scale,
        anchor_steps=manifest["anchor_steps"][: max(1, options.anchored_steps)],
        with_denoised=manifest["options"]["with_denoised"],
        guidance_batch=options.guidance_batch,
    )
    return OnlineAnchors(asked, job.rows, **drawing)
