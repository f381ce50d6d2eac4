"""Frozen networks whose linear layers are stored in 8 or 4 bits (torchao); they compute in the dtype they had."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_IN_A_BLOCK = re.compile(r"\.\d+\.")  # layers of repeated blocks; those before and after them are few, and sensitive
_UNPACKING = {"Float8Tensor": 8, "NF4Tensor": 14}  # bytes of each number: float32 copies; indices of 8 bytes and halves
_NF4_NUMBERS = 64 * 256  # numbers that share scales of scales: a weight must have a multiple of them


def quantize(network: nn.Module, weights: str, device: torch.device | str) -> None:
    """Store the linear layers of a network's blocks in `fp8`, `int8` (a scale per row) or `nf4` (per 64 numbers).

    Args:
        network: frozen; on the CPU, or on the meta device.
        device: where a layer is converted, and stays.

    Raises:
        ValueError: if no layer can be stored so.
    """
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, to_nf4

    converters = {
        "fp8": partial(Float8Tensor.from_hp, granularity=PerRow()),
        "int8": partial(Int8Tensor.from_hp, granularity=PerRow()),
        "nf4": to_nf4,
    }
    multiple = _NF4_NUMBERS if weights == "nf4" else 1
    layers = [
        layer
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear) and _IN_A_BLOCK.search(name) and layer.weight.numel() % multiple == 0
    ]
    if not layers:
        raise ValueError(
            f"lora.base_weights={weights}: no linear layer in the blocks of {type(network).__name__} has a multiple of "
            f"{multiple:,} weights: set base_weights=as_teacher"
        )
    for layer in layers:
        stored = converters[weights](layer.weight.detach().to(device))
        layer.weight = nn.Parameter(stored, layer.weight.requires_grad)  # false: the network does not use it


def unpacking_bytes(network: nn.Module) -> int:
    """Bytes that torchao takes for a moment to unpack the largest stored layer, beside its plain weight."""
    weights = (layer.weight for layer in network.modules() if isinstance(layer, nn.Linear))
    return max((_UNPACKING.get(type(weight.data).__name__, 0) * weight.numel() for weight in weights), default=0)


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors that hold a tensor's numbers: itself, or codes and scales of a quantised one."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_tensors(getattr(tensor, name))
