"""The fixed parts of one distillation: networks with their optimizers, data, draws, processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import EVERY_LEVEL, Backbone, Conditioning, conditioned, guided
from dpdmd_pipeline.dpdmd.anchor import check_falling
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import Denoise
from dpdmd_pipeline.training.anchors import AnchorBatch, Rows
from dpdmd_pipeline.training.draws import Draws, process_share, size_of_cycle
from dpdmd_pipeline.training.optimizer import make_optimizer, norm_of_added_gradient
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe
from dpdmd_pipeline.training.roles import Roles, trainable
from dpdmd_pipeline.training.sharding import is_sharded, norm_of_added_shards, unsynced, whole
from dpdmd_pipeline.training.speed import onto, speed_up


@dataclass(frozen=True)
class TrainingData:
    """Prompts, anchors, and the teacher's schedule and guidance, for pictures of one size."""

    embeddings: Rows  # of all prompts, the empty one last
    prompts: Sequence[int]  # training prompts, as rows of the embeddings
    draw_anchors: Callable[[int, Sequence[int]], AnchorBatch]  # (cycle, batch indices) -> samples of the student update
    anchor_levels: Sequence[NoiseLevel]  # scalar level of each anchor
    teacher_levels: NoiseLevel  # the teacher's own schedule, [steps + 1]
    guidance_scale: float  # of the teacher
    of_teacher: Backbone | None = None  # the teacher's adapter, if it is not that of the run
    other_sizes: Sequence[tuple[Backbone, TrainingData]] = ()  # adapter and data of each further picture size


@dataclass(frozen=True)
class Trained:
    """A trained network and its optimizer."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    max_grad_norm: float

    def update(self) -> Tensor:
        """Clip the gradients and take one optimizer step; returns their norm before clipping."""
        norm = torch.nn.utils.clip_grad_norm_(trainable(self.network), self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return whole(norm)


@dataclass(frozen=True)
class Run:
    """One distillation in one process. Everything that changes during the run is part of `training.state.State`."""

    backbone: Backbone
    teacher: nn.Module  # frozen
    student: Trained
    fake_score: Trained
    data: TrainingData
    recipe: Recipe
    execution: Execution
    accelerator: Accelerator
    draws: Draws
    batch_indices: range  # this process's share of each global batch
    levels: NoiseLevel  # the student's schedule, [N + 1]

    other_sizes: Sequence[Run] = ()  # this run for each further picture size

    def for_cycle(self, cycle: int) -> Run:
        """This run for the picture size of a cycle."""
        runs = (self, *self.other_sizes)
        return runs[size_of_cycle(self.recipe.seed, cycle, len(runs))]

    # ---- roles under given prompts, as denoisers

    def cond(self, prompts: Sequence[int]) -> Conditioning:
        """Embeddings of prompts, on the device."""
        return {name: onto(self.accelerator.device, rows) for name, rows in self.data.embeddings.rows(prompts).items()}

    @cached_property
    def uncond(self) -> Conditioning:
        """Embedding of the empty prompt, [1, ...]."""
        return self.cond([len(self.data.embeddings) - 1])

    def denoiser(self, role: Trained, cond: Conditioning) -> Denoise:
        """Student or fake score, in the recipe's arithmetic."""
        # Not accelerate's autocast: its patched `forward` is a cycle, which keeps a network after the run
        bfloat16 = self.recipe.precision == "bfloat16"
        autocast = torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=bfloat16)
        return autocast(conditioned(self.backbone, role.network, cond))

    def guided_teacher(self, cond: Conditioning, interval: tuple[float, float] = EVERY_LEVEL) -> Denoise:
        """The teacher with classifier-free guidance; see `guided`."""
        scale, batch = self.data.guidance_scale, self.execution.guidance_batch
        backbone = self.data.of_teacher or self.backbone
        return guided(backbone, self.teacher, cond, self.uncond, scale, interval=interval, batch=batch)

    # ---- gradients

    def gradient_sync(self, role: Trained, *, sync: bool) -> AbstractContextManager:
        """Exchange gradients between processes in the next backward pass, or add them up in this process only."""
        if sync:
            return nullcontext()
        return unsynced(role.network) if is_sharded(role.network) else self.accelerator.no_sync(role.network)

    def backward_student(self, loss: Tensor, *, measured: bool, retain_graph: bool = False) -> Tensor | None:
        """Add a loss's gradient to the student's; returns its norm, as a mean over all processes, if `measured`."""
        backward = partial(self.accelerator.backward, loss, retain_graph=retain_graph)
        if not measured:
            return backward()
        weights = trainable(self.student.network)
        if is_sharded(self.student.network):
            return norm_of_added_shards(backward, weights)
        return norm_of_added_gradient(backward, weights, partial(self.accelerator.reduce, reduction="mean"))


def prepare(backbone: Backbone, roles: Roles, data: TrainingData, recipe: Recipe, execution: Execution) -> Run:
    """Prepare the networks for training, here or as one of several processes.

    Raises:
        ValueError: if the options do not fit the networks or the number of processes.
    """
    # Processes exchange gradients, nothing else
    exchange = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=backbone.device.type == "cpu", mixed_precision="no", kwargs_handlers=[exchange])
    batch_indices = process_share(recipe.batch_size, accelerator.process_index, accelerator.num_processes)
    levels = backbone.student_schedule(recipe.grid, recipe.num_steps)
    if recipe.anchored_steps and recipe.space == "eps" and levels[0].alpha == 0:
        raise ValueError("space=eps gives the first step of a flow model no weight at all: choose v or x0")
    for part in (data, *(other for _, other in data.other_sizes)):
        check_falling([levels[0], *part.anchor_levels])
    speed_up(roles, execution, 1 + len(data.other_sizes))
    run = Run(
        backbone=backbone,
        teacher=roles.teacher,
        student=_prepare_role(accelerator, roles.student, recipe.student, execution.fused),
        fake_score=_prepare_role(accelerator, roles.fake_score, recipe.fake_score, execution.fused),
        data=data,
        recipe=recipe,
        execution=execution,
        accelerator=accelerator,
        draws=Draws(backbone, recipe.seed, data.prompts, recipe.between_steps == "renoise", accelerator.device),
        batch_indices=batch_indices,
        levels=levels,
    )
    others = [
        replace(run, backbone=other, data=part, draws=replace(run.draws, backbone=other))
        for other, part in data.other_sizes
    ]
    return replace(run, other_sizes=others)


def _prepare_role(accelerator: Accelerator, network: nn.Module, recipe: OptimizerRecipe, fused: bool) -> Trained:
    optimizer = make_optimizer(trainable(network), recipe, fused=fused)
    if not is_sharded(network):  # a sharded network exchanges gradients by itself
        network, optimizer = accelerator.prepare(network, optimizer)
    return Trained(network, optimizer, recipe.max_grad_norm)
