"""Loss by storing an adapter in a precision: of its change to the weights, and of its own factors."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd_pipeline.backbones.lora import change_of, modules_of

log = logging.getLogger(__name__)

# Share of a change that may be lost. Rounding is random: the stored change still has a cosine of 0.995 with the exact.
LARGEST_LOSS = 0.1


class Loss(NamedTuple):
    """Norm of the difference between stored and exact values, as a share of the norm of the exact ones."""

    overall: float  # over all weights
    worst: float  # of one weight
    weight: str  # its name


def merge_losses(
    weights: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float, dtype: torch.dtype
) -> dict[str, Loss]:
    """Losses by storing the sum of a network and an adapter, `weights` in float32: of the sum, and of the change."""
    merged = {module: weights[f"{module}.weight"] for module in modules_of(adapter)}
    changes = ((module, scale * change_of(adapter, module)) for module in merged)
    return {
        "merged weights": _loss((name, _rounding(weight, dtype), weight) for name, weight in merged.items()),
        "adapter's change, merged": _loss((name, _rounding(merged[name], dtype), change) for name, change in changes),
    }


def lora_loss(adapter: Mapping[str, Tensor], stored: Mapping[str, Tensor], scale: float) -> dict[str, Loss]:
    """Loss by storing an adapter; `scale` is that of the adapter over that of the stored one."""
    changes = ((name, scale * change_of(adapter, name), change_of(stored, name)) for name in modules_of(adapter))
    return {"adapter's change, LoRA": _loss((name, stored - exact, exact) for name, exact, stored in changes)}


def check_losses(losses: Mapping[str, Loss], dtype: torch.dtype) -> None:
    """Log a warning for each loss above the bound."""
    for name, loss in losses.items():
        if loss.worst > LARGEST_LOSS:
            log.warning(
                "export: %s keeps too little of %s: %.2g %% are lost, in %s %.2g %%; set export.dtype=float32",
                *(str(dtype).removeprefix("torch."), name, 100 * loss.overall, loss.weight, 100 * loss.worst),
            )


def check_underflow(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    """Refuse a factor that becomes zero, and log a warning for factors below the normal numbers of `dtype`."""
    small = {}
    for name, value in tensors.items():
        stored = value.to(dtype)
        if value.any() and not stored.any():
            raise ValueError(f"{name} becomes zero in {dtype}: set export.dtype to bfloat16 or float32")
        small[name] = float(((stored.abs() < torch.finfo(dtype).tiny) & (value != 0)).float().mean())
    name = max(small, key=small.get)
    if small[name] > LARGEST_LOSS:
        log.warning(
            "export: %.2g %% of %s are below the normal numbers of %s: set export.dtype to bfloat16 or float32",
            *(100 * small[name], name, str(dtype).removeprefix("torch.")),
        )


def _rounding(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype).float() - weight


def _loss(weights: Iterable[tuple[str, Tensor, Tensor]]) -> Loss:
    """Loss over weights, each with its name, the difference and the exact values."""
    norms = {name: (difference.norm().item(), exact.norm().item()) for name, difference, exact in weights}
    shares = {name: difference / exact for name, (difference, exact) in norms.items() if exact}
    worst = max(shares, key=shares.get, default="")
    difference, exact = (math.hypot(*values) for values in zip(*norms.values(), strict=True))
    return Loss(difference / exact if exact else 0.0, shares.get(worst, 0.0), worst)
