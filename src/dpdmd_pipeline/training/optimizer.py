"""AdamW of a trained network, and the student's learning rate over its turns."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe


def make_optimizer(
    parameters: Sequence[nn.Parameter], recipe: OptimizerRecipe, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW as the recipe says.

    Args:
        parameters: trained ones.
        recipe: of their network.
        fused: one kernel for a whole update, the same but for rounding; adamw_8bit has its own in any case.

    Raises:
        ValueError: if 8-bit moments are asked for where bitsandbytes or CUDA is absent.
    """
    options = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.kind == "adamw":
        # None, not False, lets torch choose the fastest of the others
        optimizer = torch.optim.AdamW(parameters, **options, fused=fused or None)
        optimizer.register_load_state_dict_pre_hook(partial(_computed_as_here, fused=fused))
        optimizer.register_load_state_dict_post_hook(_lay_out_as_the_weights)
        return optimizer
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("kind=adamw_8bit needs bitsandbytes: `pip install bitsandbytes`, or set kind=adamw") from None
    if not torch.cuda.is_available():
        raise ValueError("kind=adamw_8bit needs a CUDA device, torch finds none here: set kind=adamw")
    return AdamW8bit(parameters, **options)


def _computed_as_here(_optimizer: torch.optim.Optimizer, state: dict[str, Any], fused: bool) -> dict[str, Any]:
    """A state goes on as this run computes, not as the run that saved it did."""
    return {**state, "param_groups": [{**group, "fused": fused or None} for group in state["param_groups"]]}


def _lay_out_as_the_weights(optimizer: torch.optim.Optimizer) -> None:
    """Fused kernels take the moments to lie in memory as the weights do, and are silently wrong where they do not."""
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                moments[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Share of the student's learning rate at a step; a function of the step alone, so resuming needs no state."""
    rising = (step + 1) / (recipe.warmup + 1)
    falling = recipe.decay * recipe.max_steps
    return min(1.0, rising, (recipe.max_steps - step) / falling if falling else 1.0)
