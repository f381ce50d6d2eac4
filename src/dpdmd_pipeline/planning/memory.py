"""Estimate of the device memory and the checkpoints of a distillation, before any weight is read.

One process holds, in bytes:

    weights       all networks: the teacher in its own dtype, trained weights in float32; with adapters one base
    gradients     of the network being trained; twice while a backward pass through several sampling steps adds to an
                  earlier one, since torch sums up a weight's gradients of all steps before it adds them
    optimizer     two moments of every trained weight, and a counter
    average       a copy of the student's trained weights, for train.ema or train.watch.keep=best
    activations   with the gradients the largest of: forward passes (saved, casts), the teacher's (calls * block),
                  backward (saved of the other passes, block), the workspace of an AdamW that is not fused, and the
                  student's rollout for the fake score (a block of train.rollout_micro_batch samples); and beside any
                  of them what unpacking a quantised layer takes
    reserved      RESERVED

These are counted on networks without weights (`weightless`); a test compares the counts with real networks on the CPU:

    passes        graded passes that wait for one backward pass
    saved         bytes that each of them keeps for it
    block         bytes that the largest checkpointed block keeps while it is repeated, and any pass without gradient
    calls         halves of a guided call that go through the network together
    casts         copies of float32 weights that autocast makes for one pass

If trained networks are sharded, each process holds its shard of their weights, gradients, moments and average. Some
tensors are whole for a while (decision 0006). The activations include the weights and gradients of two blocks and of
everything outside the blocks. The gradients include one that waits for the last backward pass of its update.

`benchmarks/fake_cycle.py` holds all of this to the real loop on fake tensors. Not measured on a GPU: the choice of
attention kernel there, the allocator's fragmentation, and RESERVED, a guess at CUDA's context and the workspaces of its
libraries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import fmean

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpdmd_pipeline.backbones.base import Backbone, Conditioning
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.backbones.quantised import unpacking_bytes
from dpdmd_pipeline.planning.cost import calls_of
from dpdmd_pipeline.planning.weightless import (
    PassMemory,
    bytes_of,
    conditioning_like,
    count_pass,
    move_to_fake,
    weightless,
)
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import Roles, make_roles, trainable
from dpdmd_pipeline.training.sharding import groups

GIB = 2**30
RESERVED = GIB  # bytes; a guess, see above
_TRAINED = ("student", "fake_score")
_COUNTED = 2  # largest batch whose pass is counted


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, by their use."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    reserved: int = RESERVED

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self))
        return f"{self.total / GIB:.1f} GiB ({parts})"


class MemoryModel:
    """Estimates for one teacher; reads its configs only.

    Args:
        backbone: over the teacher's folder, on the CPU; the memory is that of its largest picture size.
        teacher: that folder.
        cond: embeddings of one prompt, or tensors like them.
        guidance_scale: of the teacher.
        teacher_dtype: of a teacher that is a network of its own; None: that of the backbone.
        device: of the run, which decides what autocast casts and what attention keeps.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: Path,
        cond: Conditioning,
        guidance_scale: float,
        teacher_dtype: torch.dtype | None = None,
        device: str = "cuda",
    ) -> None:
        self.sizes = backbone.sizes
        backbone = backbone.at(max(self.sizes, key=math.prod))
        self.device, of_teacher = device, copy(backbone)
        of_teacher.dtype = teacher_dtype or backbone.dtype
        self.of_teacher = weightless(of_teacher, teacher)
        self.backbone, self.cond, self.calls = weightless(backbone, teacher), cond, calls_of(guidance_scale)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._roles: dict[str, Roles] = {}
        self._passes: dict[tuple[str, str, int], PassMemory] = {}

    def estimate(self, recipe: Recipe, execution: Execution) -> Memory:
        """Memory of one process that trains a recipe."""
        execution = execution.fitted_to(recipe.batch_size)
        roles = self._roles_of(recipe)
        all_weights = bytes_of(
            tensor for network in roles.networks for tensor in (*network.parameters(), *network.buffers())
        )
        whole = {role: bytes_of(trainable(getattr(roles, role))) for role in _TRAINED}
        student, fake_score = (-(-size // execution.shards) for size in whole.values())
        phases = [(0, self._rollout(recipe, execution))]
        for role in _TRAINED:
            phases += self._phases(recipe, execution, role, whole[role])
        gradients, activations = max(phases, key=sum)
        if execution.launch.total > 1 and not execution.sharded:
            gradients += max(whole.values())  # DDP keeps those of the network that is not being trained
        beside = _unsharded_bytes(roles.student) if execution.sharded else unpacking_bytes(roles.networks[0])
        return Memory(
            weights=all_weights - sum(whole.values()) + student + fake_score,
            gradients=gradients,
            optimizer=-(-self._moments(recipe) // execution.shards),
            average=student if _keeps_average(recipe) else 0,
            activations=activations + beside,
        )

    def forward_flops(self, recipe: Recipe) -> float:
        """Floating-point operations of one forward pass of one sample, at most: in proportion to the mean size."""
        pixels = [math.prod(size) for size in self.sizes]
        return self.pass_memory(recipe, "student", 1).flops * fmean(pixels) / max(pixels)

    def checkpoint_bytes(self, recipe: Recipe) -> int:
        """One state on disk: both trained networks, their moments, the average."""
        roles = self._roles_of(recipe)
        networks = [*roles.student.state_dict().values(), *roles.fake_score.state_dict().values()]
        average = bytes_of(trainable(roles.student)) if _keeps_average(recipe) else 0
        counter = torch.int64.itemsize if recipe.ema else 0  # of averaged cycles
        return bytes_of(networks) + self._moments(recipe) + average + counter

    def student_bytes(self, recipe: Recipe) -> int:
        """A finished student's weights on disk."""
        return bytes_of(self._roles_of(recipe).student.state_dict().values())

    def pass_memory(self, recipe: Recipe, role: str, batch: int) -> PassMemory:
        """One graded pass of a role ("student" or "fake_score")."""
        if recipe.roles == "full" or recipe.lora.student_rank == recipe.lora.fake_score_rank:
            role = "student"  # both networks are alike
        if batch > _COUNTED:  # all sizes grow evenly with the batch
            one, two = (self.pass_memory(recipe, role, size) for size in (1, _COUNTED))
            return one.extended(two, batch - 1)
        key = recipe.model_dump_json(include={"roles", "lora", "precision"}), role, batch
        if key not in self._passes:
            roles = self._roles_of(recipe)
            network = getattr(roles, role)
            inner = network if recipe.roles == "full" else roles.networks[0]
            with self.fake:
                self._passes[key] = count_pass(
                    self.backbone, network, inner, self.cond, batch, recipe.precision, self.device
                )
        return self._passes[key]

    def _roles_of(self, recipe: Recipe) -> Roles:
        """The roles without weights, made once."""
        key = recipe.model_dump_json(include={"roles", "lora"})
        if key not in self._roles:
            with torch.device("meta"):
                whole = {"gradient_checkpointing": False, "sharded": False}
                roles = make_roles(self.backbone, recipe, of_teacher=self.of_teacher, **whole)
            with self.fake:
                move_to_fake([roles.teacher, roles.student, roles.fake_score, *roles.networks], self.device)
            self._roles[key] = roles
        return self._roles[key]

    def _moments(self, recipe: Recipe) -> int:
        roles = self._roles_of(recipe)
        optimizers = ((roles.student, recipe.student), (roles.fake_score, recipe.fake_score))
        return sum(_moment_bytes(trainable(role), optimizer.kind) for role, optimizer in optimizers)

    def _rollout(self, recipe: Recipe, execution: Execution) -> int:
        """The student draws samples for the fake score, without gradient."""
        updates = 1 if recipe.fake_rollout == "shared" else recipe.fake_score_turns
        samples = updates * recipe.batch_size // execution.launch.total
        counted = self.pass_memory(recipe, "student", min(execution.rollout_micro_batch, samples))
        return counted.block + (0 if execution.sharded else counted.casts)

    def _phases(self, recipe: Recipe, execution: Execution, role: str, whole: int) -> list[tuple[int, int]]:
        """Gradients and activations in the phases of an update: forward, teacher, backward, optimizer."""
        counted = self.pass_memory(recipe, role, getattr(execution, f"{role}_micro_batch"))
        passes = waiting_passes(recipe) if role == "student" else 1
        calls = self.calls if role == "student" and execution.guidance_batch == "joint" else 1
        saved, casts = counted.saved, 0
        if execution.gradient_checkpointing:  # without it, autograd saves the casts, too
            saved, casts = counted.saved_between, counted.casts
        several = _backward_passes(recipe, execution, role) > 1
        before, during, after = several * whole, whole * (1 + (several and passes > 1)), whole
        if execution.sharded:  # whole are the gradients that wait for an exchange, or for those of other steps
            casts = 0  # shards are gathered in the arithmetic's precision
            after = -(-whole // execution.shards)
            measured = role == "student" and recipe.anchored_steps and execution.ratio_every
            before = during = (2 if measured else 1) * after + (whole if several or passes > 1 else 0)
        others = passes - 1 if passes > 1 else 1
        workspace = 0 if execution.fused or getattr(recipe, role).kind != "adamw" else after
        return [
            (before, passes * saved + casts),
            (before, passes * saved + calls * counted.block),
            (during, others * saved + counted.block),
            (after, workspace),
        ]


def memory_model(teacher: Path, backbone: BackboneOptions) -> MemoryModel:
    """Memory estimates of any recipe over this teacher, from its configs."""
    model = backbone.load(teacher, "cpu")
    dtype = getattr(torch, backbone.teacher_dtype or backbone.dtype)
    return MemoryModel(model, teacher, conditioning_like(model), backbone.guidance_scale, dtype)


def waiting_passes(recipe: Recipe) -> int:
    """Graded passes of a student update that wait for a backward pass at the same time.

    L_div is back-propagated before L_DMD's passes begin, unless L_DMD reaches the anchored steps, too.
    """
    anchored = recipe.anchored_steps
    if recipe.graded_steps != "all":
        return max(anchored, 1)
    rest = recipe.num_steps - anchored
    return max(anchored, rest) if recipe.stop_gradient else max(0, 2 * anchored - 1) + rest


def _keeps_average(recipe: Recipe) -> bool:
    return bool(recipe.ema) or recipe.watch.keep == "best"


def _backward_passes(recipe: Recipe, execution: Execution, role: str) -> int:
    """Backward passes of one update, whose gradients add up."""
    share = recipe.batch_size // execution.launch.total
    losses = 2 if role == "student" and recipe.anchored_steps else 1
    return losses * -(-share // getattr(execution, f"{role}_micro_batch"))


def _unsharded_bytes(network: nn.Module) -> int:
    """Weights and gradients of a sharded network that are whole at the same time.

    They are those outside of all blocks, of the current block, and of the next or the one before.
    """
    *inner, outside = (bytes_of(group) for group in groups(network).values())
    return 2 * (outside + 2 * max(inner))


def _moment_bytes(parameters: Sequence[nn.Parameter], kind: str) -> int:
    """Bytes of AdamW's state.

    In 8 bits (bitsandbytes) a moment of 4,096 numbers or more has a byte each, and a scale per 256. This is not checked
    if that library is missing.
    """
    if kind == "adamw":
        return 2 * bytes_of(parameters) + 4 * len(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    return sum(2 * (size + 4 * -(-size // 256)) if size >= 4096 else 8 * size for size in sizes)
