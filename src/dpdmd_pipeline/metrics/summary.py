"""Means over prompts with their intervals, and the share of the gap recovered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_RESAMPLES = 2000
_IN_MEMORY = 1 << 22  # resampled values in memory at once


def interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    """Mean over prompts, of values [P], with a 95 % bootstrap interval.

    The bootstrap resamples prompts, not pictures: pictures of one prompt are not independent evidence.
    """
    values = per_prompt.double()
    return with_percentiles(values.mean().item(), _resampled_means(values[None], seed)[0])


def _resampled_means(rows: Tensor, seed: int) -> Tensor:
    """Means of rows [k, P] over the same resampled prompts, [k, resamples]."""
    return torch.cat([rows[:, index].mean(2) for index in resamples(rows.shape[1], seed)], dim=1)


def resamples(count: int, seed: int) -> Iterator[Tensor]:
    """Indices of the bootstrap's samples of `count` prompts, in chunks [resamples, count]."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _IN_MEMORY // count)
    for start in range(0, _RESAMPLES, at_once):
        yield torch.randint(count, (min(at_once, _RESAMPLES - start), count), generator=generator)


def with_percentiles(value: float | None, resampled: Tensor | None) -> dict[str, float | None]:
    """A value with the ends of the 95 % interval of [resamples] values, which are None without them."""
    if resampled is None:
        return {"value": value, "low": None, "high": None}
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}


def figure(per_prompt: Tensor, pictures: int, preset: str, seed: int) -> dict[str, Any]:
    """The report of one metric: mean, interval, numbers of prompts and pictures, and protocol.

    Args:
        per_prompt: [P]; NaN for a prompt that could not be measured, which counts but does not enter the mean.
        pictures: number of measured pictures.
        preset: the protocol, in words.

    Returns:
        value, low, high, n and preset. The interval is None for one prompt, the value too for none.
    """
    measured = per_prompt[~per_prompt.isnan()]
    n = {"prompts": len(measured), "pictures": pictures, "prompts_not_measured": len(per_prompt) - len(measured)}
    value = measured.double().item() if len(measured) == 1 else None
    numbers = interval(measured, seed) if len(measured) > 1 else with_percentiles(value, None)
    return numbers | {"n": n, "preset": preset}


def ratio_interval(marks: Tensor, owners: Tensor, seed: int) -> dict[str, float | None]:
    """Mean of marks of pictures with a 95 % bootstrap interval over prompts, which may have unequal numbers of them.

    Args:
        marks: [n], one per picture.
        owners: [n], number of each picture's prompt.

    Returns:
        value, low, high; no interval for one prompt.
    """
    prompts, number = owners.unique(return_inverse=True)
    rows = torch.zeros(2, len(prompts), dtype=torch.float64)
    rows[0].index_add_(0, number, marks.double())
    rows[1].index_add_(0, number, torch.ones_like(marks, dtype=torch.float64))
    sums, counts = _resampled_means(rows, seed) if len(prompts) > 1 else (None, None)
    return with_percentiles(marks.double().mean().item(), sums if sums is None else sums / counts)


def gap_figure(teacher: Tensor, dmd: Tensor, ours: Tensor, seed: int) -> dict[str, float | None]:
    """Share of the gap recovered with a 95 % interval over prompts, resampled together for all three models.

    Args:
        teacher, dmd, ours: [P] each, for the same prompts in the same order.

    Returns:
        value, low, high: None if DMD lost nothing; no interval if 1 resample in 40 or more has no gap.
    """
    rows = torch.stack([teacher, dmd, ours]).double()
    value = gap_recovered(*rows.mean(1).tolist())
    shares = None
    if value is not None and rows.shape[1] > 1:
        means = _resampled_means(rows, seed)
        gaps = means[0] - means[1]
        if (gaps <= 0).double().mean() < 0.025:
            shares = ((means[2] - means[1]) / gaps)[gaps > 0]
    return with_percentiles(value, shares)


def gap_recovered(teacher: float, dmd: float, ours: float) -> float | None:
    """(ours - DMD) / (teacher - DMD): 0 is DMD's diversity, 1 the teacher's; None if DMD lost nothing."""
    return (ours - dmd) / (teacher - dmd) if teacher > dmd else None
