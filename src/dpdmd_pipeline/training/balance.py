"""The weight of L_div that keeps its gradient in a fixed ratio to that of L_DMD."""

from __future__ import annotations

import torch
from torch import Tensor

from dpdmd_pipeline.training.recipe import Recipe


class Balance:
    """lambda such that |lambda grad L_div| = diversity_weight |grad L_DMD|, gradients in the student's weights.

    The adaptive weight of arXiv:2012.09841, eq. 7, there of the last layer, here of all trained weights. Measured of
    whole batches at fixed turns, so that neither parts nor processes change it, and averaged in logarithms over the
    measurements: twice and half weigh the same.

    Args:
        recipe: how often, how smooth, in which ratio.
        device: of the losses.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self._log_ratio: Tensor | None = None  # of |grad L_DMD| to |grad L_div|; stays on the device

    def due(self, step: int) -> bool:
        """Whether the turn at a step measures; the first does."""
        return step % self.recipe.balance_every == 0

    def measure(self, diversity: Tensor, dmd: Tensor) -> None:
        """Take up the norms of the two unweighted gradients."""
        measured, share = (dmd / diversity).log(), 1 - self.recipe.balance_ema
        self._log_ratio = measured if self._log_ratio is None else self._log_ratio.lerp(measured, share)

    @property
    def weight(self) -> Tensor:
        """lambda, a scalar."""
        return self.recipe.diversity_weight * self._log_ratio.exp()

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint; exact, since a float holds what a float32 does."""
        return {} if self._log_ratio is None else {"log_ratio": self._log_ratio.item()}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self._log_ratio = torch.tensor(state["log_ratio"], device=self.device) if state else None
