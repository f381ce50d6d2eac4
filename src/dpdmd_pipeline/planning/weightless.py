"""Networks without weights, from a teacher's configs alone, and the memory and work of one pass through them.

They are fake tensors on which the real code runs once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass, transform_subclass
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.base import Backbone, Conditioning
from dpdmd_pipeline.backbones.options import BaseWeights
from dpdmd_pipeline.backbones.quantised import plain_tensors, quantize
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.limits import read_json

Storages = dict[int, Any]  # by identity; holding a storage keeps its identity from being reused

# torch's counter does not know the CPU's attention kernel; its operations follow from the shapes of its inputs
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


def weightless(backbone: Backbone, teacher: Path) -> Backbone:
    """A copy of a backbone whose networks are on the meta device: they have shapes and no weights."""

    def load_model(
        folder: Path | None = None, *, float32: bool = False, weights: BaseWeights = "as_teacher"
    ) -> nn.Module:
        kind = network_class(teacher)
        with torch.device("meta"):
            network = kind.from_config(kind.load_config(network_folder(teacher)))
        # diffusers' own `to` warns of trained weights
        network = nn.Module.to(network, torch.float32 if float32 else backbone.dtype)
        if weights != "as_teacher":
            quantize(network.requires_grad_(False), weights, "meta")
        return network

    shaped = copy(backbone)
    shaped.load_model = load_model
    return shaped


def network_class(teacher: Path) -> Any:
    """diffusers' class of a pipeline's denoising network."""
    import diffusers

    config = read_json(network_folder(teacher) / "config.json")
    return getattr(diffusers, config["_class_name"])


def conditioning_like(backbone: Backbone) -> Conditioning:
    """Tensors like the embeddings of one prompt, [1, ...], from the teacher's configs alone; they hold no numbers."""
    return {
        name: torch.empty(1, *shape, dtype=backbone.dtype, device="meta")
        for name, shape in backbone.conditioning_shapes().items()
    }


def move_to_fake(networks: Sequence[nn.Module], device: torch.device | str) -> None:
    """Replace meta tensors by fake ones (under a FakeTensorMode): meta has no autocast and no attention kernels."""
    replacements: dict[int, Tensor] = {}
    for module in nn.ModuleList(networks).modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replacements.setdefault(id(tensor), _empty_like(tensor, device))


def _empty_like(tensor: Tensor, device: torch.device | str) -> Tensor:
    if is_traceable_wrapper_subclass(tensor):  # quantised
        empty = transform_subclass(tensor.detach(), lambda _, inner: _empty_like(inner, device))
    else:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    return sum(storage.nbytes() for storage in _storages(tensors).values())


def _storages(tensors: Iterable[Tensor]) -> Storages:
    plain = chain.from_iterable(map(plain_tensors, tensors))
    return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in plain}


# ---- one pass


@dataclass(frozen=True)
class PassMemory:
    """One graded pass of a batch.

    Attributes:
        saved: bytes that autograd keeps until the backward pass, without checkpointing.
        saved_between: the same with checkpointing: inputs of the blocks, and everything outside of them.
        block: bytes that the largest block keeps.
        casts: bytes of autocast's copies of the weights.
        flops: floating-point operations of the forward pass, per sample.
    """

    saved: int
    saved_between: int
    block: int
    casts: int
    flops: float

    def extended(self, other: PassMemory, times: float) -> PassMemory:
        """This pass, and `times` its difference to one of a larger batch."""
        names = ("saved", "saved_between", "block", "casts")
        sizes = {
            name: getattr(self, name) + round(times * (getattr(other, name) - getattr(self, name))) for name in names
        }
        return replace(self, **sizes)


def count_pass(
    backbone: Any,
    network: nn.Module,
    inner: nn.Module,
    cond: Conditioning,
    batch: int,
    precision: str,  # float32 or bfloat16
    device: str,
) -> PassMemory:
    """Run one graded pass and add up the storages that autograd keeps, each once and without parameters.

    Args:
        network, inner: one role, and diffusers' network in it; fake tensors on `device`.
        cond: tensors like the embeddings of one prompt.
    """
    outside: Storages = {}
    counter = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
    parameters = _storages([*network.parameters(), *inner.parameters()])
    blocks = _Blocks(parameters, counter)
    inner.enable_gradient_checkpointing(blocks)
    casts = precision == "bfloat16"
    with (
        torch.device(device),
        counter,
        _saved_tensors_in(outside),
        autocast(device) if casts else nullcontext(),
        _CudaAttention() if device == "cuda" else nullcontext(),
    ):
        _denoise_zeros(backbone, network, cond, batch)
    cast = [p for p in inner.parameters() if casts and p.requires_grad and p.dtype == torch.float32]
    return PassMemory(
        saved=_size(outside | blocks.saved, parameters) + blocks.repeated,
        saved_between=_size(outside | blocks.between, parameters),
        block=blocks.largest,
        casts=bytes_of(cast) // 2,
        flops=(counter.get_total_flops() + blocks.flops) / batch,
    )


class _Kind(NamedTuple):
    """A block that has run, for those that are like it."""

    own: int  # bytes that it keeps in storages of its own
    shared: list[int]  # which of its inputs and outputs it keeps
    outputs: Any
    flops: int


class _Blocks:
    """The checkpointed blocks of a pass: the first of a kind runs, the others are counted like it.

    Attributes:
        between: storages that the blocks get.
        saved: storages that they keep.
        repeated, flops: bytes and operations of the blocks that did not run.
        largest: bytes that a block keeps, at most.
    """

    def __init__(self, parameters: Storages, counter: FlopCounterMode) -> None:
        self.parameters, self.counter, self.kinds = parameters, counter, {}
        self.between, self.saved = {}, {}
        self.repeated = self.flops = self.largest = 0

    def __call__(self, function: Callable, *args: Any) -> Any:
        self.between |= _storages(value for value in args if isinstance(value, Tensor))
        name = str(tree_map(_likeness, (function, args)))
        if name not in self.kinds:
            return self._run(name, function, args)
        kind = self.kinds[name]
        outputs = tree_map_only(Tensor, _like, kind.outputs)
        tensors = _tensors((args, outputs))
        self.saved |= _storages(tensors[index] for index in kind.shared)
        self.repeated += kind.own
        self.flops += kind.flops
        return outputs

    def _run(self, name: str, function: Callable, args: Any) -> Any:
        saved: Storages = {}
        before = self.counter.get_total_flops()
        with _saved_tensors_in(saved):
            outputs = function(*args)
        tensors = _tensors((args, outputs))
        shared = [index for index, tensor in enumerate(tensors) if _storages([tensor]).keys() & saved.keys()]
        own = _size(saved, self.parameters | _storages(tensors))
        flops = self.counter.get_total_flops() - before
        if isinstance(function, nn.Module):
            self.kinds[name] = _Kind(own, shared, outputs, flops)
        self.saved |= saved
        self.largest = max(self.largest, _size(saved, self.parameters))
        return outputs


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _likeness(value: Any) -> Any:
    """All that decides what a block keeps: of a tensor its form, of a network its class and those of its weights."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.stride(), value.dtype, value.requires_grad
    if isinstance(value, nn.Module):
        return type(value), [(name, _likeness(weight)) for name, weight in value.named_parameters()]
    return value


def _like(tensor: Tensor) -> Tensor:
    """A tensor of this form in a storage of its own; a result if it has a gradient, which may be changed in place."""
    empty = torch.empty_like(tensor)
    return empty.requires_grad_().clone() if tensor.requires_grad else empty


def _denoise_zeros(backbone: Any, network: nn.Module, cond: Conditioning, batch: int) -> None:
    """Run one pass of `batch` samples on torch's default device."""
    latents = torch.zeros(batch, *backbone.latent_shape)
    level = NoiseLevel(*(torch.full((batch, 1, 1, 1), value) for value in (0.5, 0.5, 500)))
    inputs = {name: torch.zeros(batch, *value.shape[1:], dtype=value.dtype) for name, value in cond.items()}
    backbone.denoise(network, latents, level, inputs)


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """Autocast to bfloat16; `torch.autocast` turns CUDA's off where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


class _CudaAttention(TorchFunctionMode):
    """Attention by the kernels that keep no matrix; torch chooses them on a real GPU alone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **_: Any) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        query, key, value = (tensor.to(torch.bfloat16) for tensor in (query, key, value))
    if attn_mask is None and query.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
    if attn_mask is not None:
        attn_mask = attn_mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, attn_mask, True)[0]


@contextmanager
def _saved_tensors_in(storages: Storages) -> Iterator[None]:
    """Collect the storages that autograd saves."""

    def pack(tensor: Tensor) -> Tensor:
        storages.update(_storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _size(storages: Storages, excluded: Storages) -> int:
    return sum(storage.nbytes() for name, storage in storages.items() if name not in excluded)
