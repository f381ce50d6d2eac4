"""AdamW of a trained network, norms of its gradients, and the student's learning rate over the cycles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe


def make_optimizer(
    parameters: Sequence[nn.Parameter], recipe: OptimizerRecipe, *, fused: bool = False
) -> torch.optim.Optimizer:
    """AdamW by a recipe; `fused` has one kernel per update, the same but for rounding (adamw_8bit has its own).

    Raises:
        ValueError: if 8-bit moments lack bitsandbytes or CUDA.
    """
    options = {"lr": recipe.learning_rate, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if recipe.kind == "adamw":
        # None, not False, lets torch choose the fastest other implementation
        optimizer = torch.optim.AdamW(parameters, **options, fused=fused or None)
        optimizer.register_load_state_dict_pre_hook(partial(_with_fused, fused=fused))
        optimizer.register_load_state_dict_post_hook(_lay_out_as_the_weights)
        return optimizer
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("kind=adamw_8bit needs bitsandbytes: `pip install bitsandbytes`, or set kind=adamw") from None
    if not torch.cuda.is_available():
        raise ValueError("kind=adamw_8bit needs a CUDA device, torch finds none here: set kind=adamw")
    return AdamW8bit(parameters, **options)


def _with_fused(_optimizer: torch.optim.Optimizer, state: dict[str, Any], fused: bool) -> dict[str, Any]:
    """Continue a loaded state with this run's kernels, not with those of the run that saved it."""
    return {**state, "param_groups": [{**group, "fused": fused or None} for group in state["param_groups"]]}


def _lay_out_as_the_weights(optimizer: torch.optim.Optimizer) -> None:
    """Give the moments the memory format of their weights: fused kernels assume it, or are silently wrong."""
    for weight, moments in optimizer.state.items():
        for name, value in moments.items():
            if value.shape == weight.shape and value.stride() != weight.stride():
                moments[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)


def norm_of_added_gradient(
    backward: Callable[[], object], parameters: Sequence[nn.Parameter], mean: Callable[[Tensor], Tensor]
) -> Tensor:
    """Run a backward pass; returns the norm of the gradient that it adds, of which no copy is kept.

    Args:
        backward: the pass.
        parameters: leaves; a hook sees each one's gradient before it is added to that of earlier passes.
        mean: of a tensor over all processes.
    """
    norms: dict[int, Tensor] = {}

    def measure(number: int, grad: Tensor) -> None:
        norms[number] = mean(grad).norm()

    hooks = [parameter.register_hook(partial(measure, number)) for number, parameter in enumerate(parameters)]
    try:
        backward()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([norms[number] for number in sorted(norms)]).norm()


def learning_rate_share(recipe: Recipe, cycle: int) -> float:
    """Share of the student's full learning rate in a cycle; no state is needed to resume."""
    rising = (cycle + 1) / (recipe.warmup + 1)
    falling = recipe.decay * recipe.max_steps
    return min(1.0, rising, (recipe.max_steps - cycle) / falling if falling else 1.0)
