"""Memory and work of one graded pass through a network, counted on fake tensors that run the real code once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dpdmd_pipeline.backbones.base import Conditioning
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.planning.weightless import bytes_of

Storages = dict[int, Any]  # by their identity

# torch's counter does not know the CPU's attention kernel; its operations follow from the shapes of its inputs
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


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


def count_pass(
    backbone: Any, network: nn.Module, inner: nn.Module, cond: Conditioning, batch: int, precision: Any
) -> PassMemory:
    """Run one graded pass and add up the storages that autograd keeps, each once and without parameters.

    Args:
        backbone: of the family.
        network: one role.
        inner: diffusers' network in it.
        cond: [batch, ...].
        precision: autocast context, enabled or not.
    """
    outside: Storages = {}
    between: Storages = {}
    blocks: list[Storages] = [{}]

    def checkpoint(function: Callable, *args: Any) -> Any:
        _collect(between, [value for value in args if isinstance(value, Tensor)])
        blocks.append({})
        with _saved_tensors_in(blocks[-1]):
            return function(*args)

    latents = torch.zeros(batch, *backbone.latent_shape)
    level = NoiseLevel(*(torch.full((batch, 1, 1, 1), 0.5) for _ in range(2)), torch.full((batch, 1, 1, 1), 500))
    with (
        _checkpointed_by(inner, checkpoint),
        FlopCounterMode(display=False, custom_mapping=_ATTENTION) as counter,
        _saved_tensors_in(outside),
        precision,
    ):
        backbone.denoise(network, latents, level, cond)
    parameters = {parameter.untyped_storage()._cdata for parameter in (*network.parameters(), *inner.parameters())}
    everything = outside | {name: storage for block in blocks for name, storage in block.items()}
    return PassMemory(
        saved=_size(everything, parameters),
        saved_between=_size(outside | between, parameters),
        block=max(_size(block, parameters) for block in blocks),
        casts=_casts(inner),
        flops=counter.get_total_flops() / batch,
    )


def _casts(inner: nn.Module) -> int:
    """Bytes of autocast's copies of trained float32 weights: half of theirs, once per pass."""
    return bytes_of(p for p in inner.parameters() if p.requires_grad and p.dtype == torch.float32) // 2


@contextmanager
def _saved_tensors_in(storages: Storages) -> Iterator[None]:
    """Collect the storages that autograd saves."""

    def pack(tensor: Tensor) -> Tensor:
        _collect(storages, [tensor])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def _collect(storages: Storages, tensors: Sequence[Tensor]) -> None:
    for tensor in tensors:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage  # a reference, so that its identity is not reused


def _size(storages: Storages, excluded: set[int]) -> int:
    return sum(storage.nbytes() for name, storage in storages.items() if name not in excluded)


@contextmanager
def _checkpointed_by(network: nn.Module, function: Callable) -> Iterator[None]:
    """Checkpoint the network's blocks with a function, and restore its own afterwards."""
    modules = [module for module in network.modules() if hasattr(module, "gradient_checkpointing")]
    before = {
        module: (module.gradient_checkpointing, getattr(module, "_gradient_checkpointing_func", None))
        for module in modules
    }
    network.enable_gradient_checkpointing(function)
    try:
        yield
    finally:
        for module, (enabled, own_function) in before.items():
            module.gradient_checkpointing, module._gradient_checkpointing_func = enabled, own_function
