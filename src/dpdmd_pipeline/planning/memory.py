"""Estimate of the device memory and the checkpoints of a distillation, before any weight is read.

One process holds, in bytes:

    weights       all networks: the teacher in backbone.dtype, trained weights in float32; with adapters one base
    gradients     of the network being trained; twice if the two losses' gradients are compared (train.ratio_every)
    optimizer     two moments of every trained weight, and a counter
    average       a copy of the student's trained weights, for train.ema or train.watch.keep=best
    activations   the largest of: passes * saved + max(calls * block, casts); the workspace of AdamW; the student's
                  rollout for the fake score (a block of train.rollout_micro_batch samples)
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

Not measured on a GPU: the choice of attention kernel there, the allocator's fragmentation, and RESERVED, a guess at
CUDA's context and the workspaces of its libraries. Everything else is exact up to small tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpdmd_pipeline.backbones.base import Backbone, Conditioning
from dpdmd_pipeline.backbones.options import BackboneOptions
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
        backbone: over the teacher's folder, on the CPU.
        teacher: that folder.
        cond: embeddings of one prompt, or tensors like them.
        guidance_scale: of the teacher.
    """

    def __init__(self, backbone: Backbone, teacher: Path, cond: Conditioning, guidance_scale: float) -> None:
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
        whole = {role: bytes_of(trainable(getattr(roles, role))) for role in ("student", "fake_score")}
        student, fake_score = (-(-size // execution.shards) for size in whole.values())
        compared = 2 if recipe.anchored_steps else 1
        waiting = {role: size * _has_waiting_gradient(recipe, execution, role) for role, size in whole.items()}
        return Memory(
            weights=all_weights - sum(whole.values()) + student + fake_score,
            gradients=max(compared * student + waiting["student"], fake_score + waiting["fake_score"]),
            optimizer=-(-self._moments(recipe) // execution.shards),
            average=student if _keeps_average(recipe) else 0,
            activations=max(self._activations(recipe, execution), student, fake_score),
        )

    def forward_flops(self, recipe: Recipe) -> float:
        """Floating-point operations of one forward pass of one sample."""
        return self.pass_memory(recipe, "student", 1).flops

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
        key = recipe.model_dump_json(include={"roles", "lora", "precision"}), role, batch
        if key not in self._passes:
            roles = self._roles_of(recipe)
            network = getattr(roles, role)
            inner = network if recipe.roles == "full" else roles.networks[0]
            with self.fake:
                self._passes[key] = count_pass(self.backbone, network, inner, self.cond, batch, recipe.precision)
        return self._passes[key]

    def _roles_of(self, recipe: Recipe) -> Roles:
        """The roles without weights, made once."""
        key = recipe.model_dump_json(include={"roles", "lora"})
        if key not in self._roles:
            with torch.device("meta"):
                roles = make_roles(self.backbone, recipe, gradient_checkpointing=False, sharded=False)
            with self.fake:
                move_to_fake([roles.teacher, roles.student, roles.fake_score, *roles.networks], "cpu")
            self._roles[key] = roles
        return self._roles[key]

    def _moments(self, recipe: Recipe) -> int:
        roles = self._roles_of(recipe)
        optimizers = ((roles.student, recipe.student), (roles.fake_score, recipe.fake_score))
        return sum(_moment_bytes(trainable(role), optimizer.kind) for role, optimizer in optimizers)

    def _activations(self, recipe: Recipe, execution: Execution) -> int:
        """The largest of both updates and the rollout between them, plus tensors that are whole meanwhile."""
        student = self._update(recipe, execution, "student", waiting_passes(recipe))
        fake_score = self._update(recipe, execution, "fake_score", 1)
        unsharded = _unsharded_bytes(self._roles_of(recipe).student) if execution.sharded else 0
        return max(student, fake_score, self._rollout(recipe, execution)) + unsharded

    def _rollout(self, recipe: Recipe, execution: Execution) -> int:
        """The student draws samples for the fake score, without gradient."""
        updates = 1 if recipe.fake_rollout == "shared" else recipe.fake_score_turns
        samples = updates * recipe.batch_size // execution.launch.total
        counted = self.pass_memory(recipe, "student", min(execution.rollout_micro_batch, samples))
        return max(counted.block, 0 if execution.sharded else counted.casts)

    def _update(self, recipe: Recipe, execution: Execution, role: str, passes: int) -> int:
        counted = self.pass_memory(recipe, role, getattr(execution, f"{role}_micro_batch"))
        calls = self.calls if role == "student" and execution.guidance_batch == "joint" else 1
        if execution.gradient_checkpointing:
            casts = 0 if execution.sharded else counted.casts  # shards are gathered in the arithmetic's precision
            return passes * counted.saved_between + max(calls * counted.block, casts)
        return passes * counted.saved + calls * counted.block


def memory_model(teacher: Path, backbone: BackboneOptions) -> MemoryModel:
    """Memory estimates of any recipe over this teacher, from its configs."""
    model = backbone.load(teacher, "cpu")
    return MemoryModel(model, teacher, conditioning_like(model), backbone.guidance_scale)


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


def _has_waiting_gradient(recipe: Recipe, execution: Execution, role: str) -> bool:
    """True if whole gradients wait for the exchange in the last of several backward passes of an update."""
    share = recipe.batch_size // execution.launch.total
    micro_batches = -(-share // getattr(execution, f"{role}_micro_batch"))
    losses = 2 if role == "student" and recipe.anchored_steps else 1
    return execution.sharded and micro_batches * losses > 1


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
