"""From one number per prompt to a mean with its interval, and to the share of the gap recovered."""

from __future__ import annotations

import torch
from torch import Tensor

_RESAMPLES = 2000


def interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    """Mean over prompts with a 95 % bootstrap interval.

    Prompts are resampled, not pictures: pictures of one prompt are not independent evidence.

    Args:
        per_prompt: [P].
        seed: of the resampling.
    """
    values = per_prompt.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)
    low, high = values[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": values.mean().item(), "low": low, "high": high}


def gap_recovered(teacher: float, dmd: float, ours: float) -> float | None:
    """(ours - DMD) / (teacher - DMD): 0 is DMD's diversity, 1 the teacher's; None where DMD lost nothing."""
    return (ours - dmd) / (teacher - dmd) if teacher > dmd else None
