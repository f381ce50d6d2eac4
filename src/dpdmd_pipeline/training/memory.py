"""What a distillation needs of a device's memory and of a disk, estimated before any weight is read.

One process holds, in bytes:

    weights       all networks: the teacher in backbone.dtype, trained weights in float32; with adapters one base
    gradients     of the network being trained; twice where the two losses' gradients are compared (train.ratio_every),
                  three times where L_div's are held apart (train.weighting=balanced)
    optimizer     two moments of every trained weight, and a counter
    average       a copy of the student's trained weights, where train.ema or train.watch.keep=best asks for one
    activations   passes * kept + max(calls * block, casts), at least what AdamW needs to compute with, or what the
                  student's rollout for the fake score takes (a block of train.rollout_micro_batch samples)
    reserved      RESERVED

`passes` is how many graded passes wait for one backward pass, `kept` what each keeps for it, `block` what the largest
checkpointed part keeps while it is repeated (a pass without gradient holds no more), `calls` the halves of a guided
call that go through the network together, `casts` the copies of float32 weights that autocast makes for one pass.
These are counted on networks without weights (fake tensors) that run the real code once; a test holds the counts
against real networks on the CPU.

Where trained networks are sharded, each process holds its part of their weights, gradients, moments and average. What
is whole for a while is counted whole: among the activations the weights and gradients of two blocks and of what lies
outside of them, among the gradients one that waits for the last backward pass of its turn (decision 0006).

Not measured on a GPU: the choice of attention kernel there, the allocator's fragmentation, and RESERVED, which is a
guess at the context of CUDA and the workspaces of its libraries. All else is exact up to small tensors.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, GuidanceBatch
from dpdmd_pipeline.backbones.networks import COMPONENTS
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.training.cost import calls_of
from dpdmd_pipeline.training.recipe import LoraRecipe, Recipe
from dpdmd_pipeline.training.roles import Roles, full_roles, lora_roles, trainable
from dpdmd_pipeline.training.sharding import groups

RESERVED = 2**30  # bytes; a guess, see above
GIB = 2**30


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process, by what takes them."""

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


@dataclass(frozen=True)
class PassMemory:
    """One graded pass of a batch, counted.

    Attributes:
        kept: bytes until its backward pass, without checkpointing.
        kept_between: the same with checkpointing: what goes into each block, and what lies outside of them.
        block: bytes that the largest block keeps.
        casts: bytes of autocast's copies of the weights.
        flops: floating-point operations of the forward pass, per sample.
    """

    kept: int
    kept_between: int
    block: int
    casts: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class MemorySplit:
    """How the batch is worked through, as far as memory depends on it.

    Attributes:
        student_micro_batch, fake_score_micro_batch: samples that one backward pass of a process sees.
        rollout_micro_batch: samples that the student draws at once for the fake score.
        gradient_checkpointing: of the trained networks.
        processes: that share the batch.
        sharded: whether they also share the trained networks.
    """

    student_micro_batch: int
    fake_score_micro_batch: int
    rollout_micro_batch: int
    gradient_checkpointing: bool
    guidance_batch: GuidanceBatch = "joint"
    processes: int = 1
    sharded: bool = False

    @property
    def shards(self) -> int:
        """Parts that the trained networks are in."""
        return self.processes if self.sharded else 1

    @classmethod
    def alike(cls, samples: int, *, gradient_checkpointing: bool, **rest: Any) -> MemorySplit:
        """All three parts of one size."""
        return cls(
            student_micro_batch=samples,
            fake_score_micro_batch=samples,
            rollout_micro_batch=samples,
            gradient_checkpointing=gradient_checkpointing,
            **rest,
        )


class MemoryModel:
    """Estimates for one teacher; reads its configs only.

    Args:
        backbone: over the teacher's folder, on the CPU.
        teacher: that folder.
        cond: embeddings of one prompt, or tensors like them.
        guidance_scale: of the teacher.
    """

    def __init__(self, backbone: Backbone, teacher: Path, cond: Conditioning, guidance_scale: float) -> None:
        self.backbone, self.cond, self.calls = _Weightless(backbone, teacher), cond, calls_of(guidance_scale)
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._roles, self._pass = lru_cache(self._make_roles), lru_cache(self._count_pass)

    def estimate(self, recipe: Recipe, split: MemorySplit) -> Memory:
        """Memory of one process that trains a recipe."""
        roles, loaded = self._roles(_Wanted.by(recipe))
        weights = _bytes(tensor for network in loaded for tensor in (*network.parameters(), *network.buffers()))
        whole = [_bytes(trainable(role)) for role in (roles.student, roles.fake_score)]
        student, fake_score = (-(-size // split.shards) for size in whole)
        measured = 3 if recipe.weighting == "balanced" else 2 if recipe.anchored_steps else 1
        waiting = _waiting_gradients(recipe, split, *whole)
        optimizers = ((roles.student, recipe.student), (roles.fake_score, recipe.fake_score))
        moments = sum(_moments(trainable(role), optimizer.kind) for role, optimizer in optimizers)
        return Memory(
            weights=weights - sum(whole) + student + fake_score,
            gradients=max(measured * student + waiting[0], fake_score + waiting[1]),
            optimizer=-(-moments // split.shards),
            average=student if recipe.ema or recipe.watch.keep == "best" else 0,
            activations=max(self._activations(recipe, split), student, fake_score),
        )

    def _activations(self, recipe: Recipe, split: MemorySplit) -> int:
        """The largest of the two turns' and of the rollout between them, and what of shards is whole meanwhile."""
        student = self._turn(recipe, split, "student", split.student_micro_batch, waiting_passes(recipe))
        fake_score = self._turn(recipe, split, "fake_score", split.fake_score_micro_batch, 1)
        together = _together(self._roles(_Wanted.by(recipe))[0].student) if split.sharded else 0
        return max(student, fake_score, self._rollout(recipe, split)) + together

    def _rollout(self, recipe: Recipe, split: MemorySplit) -> int:
        """The student draws for the fake score without gradient."""
        turns = 1 if recipe.fake_rollout == "shared" else recipe.fake_score_turns
        drawn = turns * recipe.batch_size // split.processes
        counted = self._pass(_Wanted.by(recipe), "student", min(split.rollout_micro_batch, drawn))
        return max(counted.block, 0 if split.sharded else counted.casts)

    def _turn(self, recipe: Recipe, split: MemorySplit, role: str, batch: int, passes: int) -> int:
        # two whole networks are alike, two adapters may differ in rank
        network = role if recipe.roles == "lora" else "student"
        counted = self._pass(_Wanted.by(recipe), network, min(batch, recipe.batch_size))
        calls = self.calls if role == "student" and split.guidance_batch == "joint" else 1
        if split.gradient_checkpointing:
            casts = 0 if split.sharded else counted.casts  # shards are brought together in the precision
            return passes * counted.kept_between + max(calls * counted.block, casts)
        return passes * counted.kept + calls * counted.block

    def forward_flops(self, recipe: Recipe) -> float:
        """Floating-point operations of one forward pass of one sample."""
        return self._pass(_Wanted.by(recipe), "student", 1).flops

    def checkpoint_bytes(self, recipe: Recipe) -> int:
        """One state on disk: both trained networks, their moments, the average."""
        memory = self.estimate(recipe, MemorySplit.alike(1, gradient_checkpointing=True))
        roles, _ = self._roles(_Wanted.by(recipe))
        networks = [*roles.student.state_dict().values(), *roles.fake_score.state_dict().values()]
        counter = torch.int64.itemsize if recipe.ema else 0  # of turns averaged
        return _bytes(networks) + memory.optimizer + memory.average + counter

    def _make_roles(self, wanted: _Wanted) -> tuple[Roles, list[nn.Module]]:
        self.backbone.loaded.clear()
        if wanted.lora is None:
            roles = full_roles(self.backbone, gradient_checkpointing=False)
        else:
            recipe = LoraRecipe.model_validate_json(wanted.lora)
            roles = lora_roles(self.backbone, recipe, seed=0, gradient_checkpointing=False)
        loaded = list(self.backbone.loaded)
        with self.fake:
            _onto_the_cpu([roles.teacher, roles.student, roles.fake_score, *loaded])
        return roles, loaded

    def _count_pass(self, wanted: _Wanted, role: str, batch: int) -> PassMemory:
        roles, loaded = self._roles(wanted)
        network = getattr(roles, role)
        precision = torch.autocast("cpu", torch.bfloat16, enabled=wanted.precision == "bfloat16")
        with self.fake:
            cond = {name: torch.zeros(batch, *v.shape[1:], dtype=v.dtype) for name, v in self.cond.items()}
            inner = network if wanted.lora is None else loaded[0]
            counted = count_pass(self.backbone, network, inner, cond, batch, precision)
        return counted if wanted.precision == "bfloat16" else replace(counted, casts=0)


@dataclass(frozen=True)
class _Wanted:
    """What of a recipe the networks depend on; the adapters' part as JSON, which can be a key."""

    precision: str
    lora: str | None

    @classmethod
    def by(cls, recipe: Recipe) -> _Wanted:
        return cls(recipe.precision, recipe.lora.model_dump_json() if recipe.roles == "lora" else None)


class _Weightless:
    """A backbone whose networks are on no device: they have shapes and no weights.

    Attributes:
        loaded: the networks it made.
    """

    def __init__(self, backbone: Backbone, teacher: Path) -> None:
        self._backbone, self._teacher = backbone, teacher
        self.loaded: list[nn.Module] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        kind, component = _network(self._teacher)
        config = kind.load_config(self._teacher, subfolder=component)
        with torch.device("meta"):
            network = kind.from_config(config)
        nn.Module.to(
            network, torch.float32 if float32 else self._backbone.dtype
        )  # diffusers' own warns of trained weights
        self.loaded.append(network)
        return network


def _onto_the_cpu(networks: Sequence[nn.Module]) -> None:
    """Put fake tensors in the places of meta tensors, which have no autocast and no attention kernels of their own."""
    made: dict[int, Tensor] = {}
    for module in {module: None for network in networks for module in network.modules()}:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = made.setdefault(id(tensor), _like(tensor))


def _like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def network_class(teacher: Path) -> type:
    """Class of a pipeline's denoising network, by its index."""
    return _network(teacher)[0]


def _network(teacher: Path) -> tuple[Any, str]:
    """Class and name of a pipeline's denoising network."""
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    name = next(name for name in COMPONENTS if name in index)
    return getattr(importlib.import_module(index[name][0]), index[name][1]), name


# ---- counting

# The CPU's attention kernel, which torch's counter does not know, by the shapes of what goes in
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def count_pass(
    backbone: Any, network: nn.Module, inner: nn.Module, cond: Conditioning, batch: int, precision: Any
) -> PassMemory:
    """Run one graded pass and add up what autograd keeps of it, every storage once and parameters not at all.

    Args:
        backbone: of the family.
        network: one role.
        inner: diffusers' network in it.
        cond: [batch, ...].
        precision: autocast, in force or not.
    """
    kept, between, blocks = {}, {}, [{}]

    def checkpoint(function: Callable, *args: Any) -> Any:
        _keep(between, [value for value in args if isinstance(value, Tensor)])
        blocks.append({})
        with _kept_in(blocks[-1]):
            return function(*args)

    latents = torch.zeros(batch, *backbone.latent_shape)
    level = NoiseLevel(*(torch.full((batch, 1, 1, 1), 0.5) for _ in range(2)), torch.full((batch, 1, 1, 1), 500))
    with (
        _checkpointed_by(inner, checkpoint),
        FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter,
        _kept_in(kept),
        precision,
    ):
        backbone.denoise(network, latents, level, cond)
    parameters = {parameter.untyped_storage()._cdata for parameter in (*network.parameters(), *inner.parameters())}
    everything = kept | {name: storage for block in blocks for name, storage in block.items()}
    sizes = [_size(found, parameters) for found in (everything, kept | between)]
    block = max(_size(found, parameters) for found in blocks)
    return PassMemory(*sizes, block, _casts(inner), counter.get_total_flops() / batch)


def _casts(inner: nn.Module) -> int:
    """Autocast copies trained float32 weights in half the bytes, once a pass."""
    return _bytes(p for p in inner.parameters() if p.requires_grad and p.dtype == torch.float32) // 2


@contextmanager
def _kept_in(found: dict[int, Any]) -> Iterator[None]:
    """Collect the storages that autograd keeps."""

    def pack(tensor: Tensor) -> Tensor:
        _keep(found, [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _keep(found: dict[int, Any], tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage._cdata] = storage  # held, so that its name is not given to another


def _size(found: dict[int, Any], without: set[int]) -> int:
    return sum(storage.nbytes() for name, storage in found.items() if name not in without)


@contextmanager
def _checkpointed_by(network: nn.Module, function: Callable) -> Iterator[None]:
    before = {module: module.gradient_checkpointing for module in _checkpointing(network)}
    functions = {module: getattr(module, "_gradient_checkpointing_func", None) for module in before}
    network.enable_gradient_checkpointing(function)
    try:
        yield
    finally:
        for module, value in before.items():
            module.gradient_checkpointing = value
            module._gradient_checkpointing_func = functions[module]


def _checkpointing(network: nn.Module) -> list[nn.Module]:
    return [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]


def waiting_passes(recipe: Recipe) -> int:
    """Graded passes of a student turn that wait for a backward pass at the same time.

    L_div's go through theirs before L_DMD's begin, unless L_DMD reaches the anchored steps, too.
    """
    anchored = recipe.anchored_steps
    if recipe.graded_steps != "all":
        return max(anchored, 1)
    rest = recipe.num_steps - anchored
    return max(anchored, rest) if recipe.stop_gradient else max(0, 2 * anchored - 1) + rest


def _waiting_gradients(recipe: Recipe, split: MemorySplit, student: int, fake_score: int) -> tuple[int, int]:
    """Bytes that a turn of each role holds from its first backward pass until the exchange in its last.

    Args:
        recipe, split: of the run.
        student, fake_score: bytes of the whole networks' gradients.
    """
    if not split.sharded:
        return 0, 0
    share = recipe.batch_size // split.processes
    student_passes = -(-share // split.student_micro_batch) * (2 if recipe.anchored_steps else 1)
    fake_score_passes = -(-share // split.fake_score_micro_batch)
    return student * (student_passes > 1), fake_score * (fake_score_passes > 1)


def _together(network: nn.Module) -> int:
    """Bytes of the weights and gradients of a sharded network that are whole at a time: those outside of all blocks,
    of the block at work and of the next or the one before."""
    *inner, outside = (_bytes(group) for group in groups(network).values())
    return 2 * (outside + 2 * max(inner))


def _moments(parameters: Sequence[nn.Parameter], kind: str) -> int:
    """Bytes of AdamW's state. In 8 bits (bitsandbytes) a moment of 4,096 numbers or more has a byte each, and a scale
    per 256; not checked, where that library is missing."""
    if kind == "adamw":
        return 2 * _bytes(parameters) + 4 * len(parameters)
    sizes = [parameter.numel() for parameter in parameters]
    return sum(2 * (size + 4 * -(-size // 256)) if size >= 4096 else 8 * size for size in sizes)


def _bytes(tensors: Any) -> int:
    """Of tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


# ---- what helps


def remedies(model: MemoryModel, recipe: Recipe, split: MemorySplit) -> list[tuple[str, int]]:
    """Options that make a run smaller, with the bytes that each spares by itself; the most helpful first."""
    now = model.estimate(recipe, split).total
    tried = {text: model.estimate(*changed).total for text, changed in _smaller(recipe, split).items()}
    return sorted(((text, now - total) for text, total in tried.items() if total < 0.99 * now), key=lambda it: -it[1])


def _smaller(recipe: Recipe, split: MemorySplit) -> dict[str, tuple[Recipe, MemorySplit]]:
    """What may be changed, as (recipe, split) by the words that say so."""
    kinds = {role: getattr(recipe, role).model_copy(update={"kind": "adamw_8bit"}) for role in _TRAINED}
    eight_bits = f"kind=adamw_8bit for both optimizers{_to_install('bitsandbytes')}"
    unsharded, also = replace(split, sharded=False), ", train.launch.sharding=none" if split.sharded else ""
    batches = {name: getattr(split, name) // 2 for name in _MICRO_BATCHES if getattr(split, name) > 1}
    halved = ", ".join(f"train.{name}={value}" for name, value in batches.items())
    found = {
        halved: (recipe, replace(split, **batches)),
        "train.gradient_checkpointing=true": (recipe, replace(split, gradient_checkpointing=True)),
        "train.guidance_batch=apart": (recipe, replace(split, guidance_batch="apart")),
        "train.ema=0": (recipe.model_copy(update={"ema": 0.0}), split),
        f"{eight_bits}{also}": (recipe.model_copy(update=kinds), unsharded),
        f"train.roles=lora{also}": (recipe.model_copy(update={"roles": "lora"}), unsharded),
    }
    if split.processes > 1 and _can_be_sharded(recipe):
        found["train.launch.sharding=fsdp2"] = (recipe, replace(split, sharded=True))
    if recipe.stop_gradient or not recipe.anchored_steps:
        found["train.graded_steps=random"] = (recipe.model_copy(update={"graded_steps": "random"}), split)
    return {text: changed for text, changed in found.items() if text}


def _to_install(package: str) -> str:
    return f" (first `pip install {package}`)" if find_spec(package) is None else ""


def _can_be_sharded(recipe: Recipe) -> bool:
    return recipe.roles == "full" and all(getattr(recipe, role).kind == "adamw" for role in _TRAINED)


_TRAINED = ("student", "fake_score")
_MICRO_BATCHES = ("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")


def describe_remedies(found: Sequence[tuple[str, int]]) -> str:
    """One phrase: each option with what it spares."""
    if not found:
        return "no option makes it smaller: take a card with more memory"
    return "; ".join(f"{text} spares {spared / GIB:.1f} GiB" for text, spared in found)


# ---- disk


def embedding_bytes(cond: Conditioning, prompts: int) -> int:
    """The cache of embeddings: every prompt, and the empty one.

    Args:
        cond: embeddings of one prompt, or tensors like them.
    """
    return (prompts + 1) * sum(value[0].numel() * value.element_size() for value in cond.values())


def anchor_bytes(
    latent_shape: Sequence[int], samples: int, levels: int, *, with_denoised: bool, dtype: torch.dtype
) -> int:
    """The cache of anchors: per sample its prompt and seed, and latents at each level."""
    latents = levels * (1 + with_denoised) * torch.Size(latent_shape).numel() * dtype.itemsize
    return samples * (2 * torch.int64.itemsize + latents)


def conditioning_like(backbone: Backbone) -> Conditioning:
    """Tensors like the embeddings of one prompt, [1, ...], from the teacher's configs alone; they hold no numbers."""
    return {
        name: torch.empty(1, *shape, dtype=backbone.dtype, device="meta")
        for name, shape in backbone.conditioning_shapes().items()
    }
