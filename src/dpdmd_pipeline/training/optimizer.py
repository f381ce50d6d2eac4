"""AdamW of a trained network, and the student's learning rate over its turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe


def make_optimizer(parameters: Sequence[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    """AdamW as the recipe says.

    Raises:
        ValueError: if 8-bit moments are asked for where bitsandbytes or CUDA is absent.
    """
    options = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.kind == "adamw":
        return torch.optim.AdamW(parameters, **options)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("kind=adamw_8bit needs bitsandbytes: `pip install bitsandbytes`, or set kind=adamw") from None
    if not torch.cuda.is_available():
        raise ValueError("kind=adamw_8bit needs a CUDA device, torch finds none here: set kind=adamw")
    return AdamW8bit(parameters, **options)


def learning_rate_share(recipe: Recipe, step: int) -> float:
    """Share of the student's learning rate at a step; a function of the step alone, so resuming needs no state."""
    rising = (step + 1) / (recipe.warmup + 1)
    falling = recipe.decay * recipe.max_steps
    return min(1.0, rising, (recipe.max_steps - step) / falling if falling else 1.0)
