"""From one number per prompt to a mean with its interval, and to the share of the gap recovered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_RESAMPLES = 2000
_HELD = 1 << 22  # resampled values in memory at once
_TAILS = torch.tensor([0.025, 0.975], dtype=torch.float64)


def interval(per_prompt: Tensor, seed: int) -> dict[str, float]:
    """Mean over prompts with a 95 % bootstrap interval.

    Prompts are resampled, not pictures: pictures of one prompt are not independent evidence.

    Args:
        per_prompt: [P].
        seed: of the resampling.
    """
    values = per_prompt.double()
    return {"value": values.mean().item(), **percentiles(_resampled_means(values[None], seed)[0])}


def _resampled_means(rows: Tensor, seed: int) -> Tensor:
    """Means of rows [k, P] over the same resampled prompts, [k, resamples]; a few resamples are held at a time."""
    return torch.cat([rows[:, index].mean(2) for index in resamples(rows.shape[1], seed)], dim=1)


def resamples(count: int, seed: int) -> Iterator[Tensor]:
    """Indices of the bootstrap's samples of `count` prompts, [a few, count] at a time."""
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _HELD // count)
    for start in range(0, _RESAMPLES, at_once):
        yield torch.randint(count, (min(at_once, _RESAMPLES - start), count), generator=generator)


def percentiles(resampled: Tensor) -> dict[str, float]:
    """The ends of the 95 % interval of [resamples] values."""
    low, high = resampled.quantile(_TAILS).tolist()
    return {"low": low, "high": high}


def figure(per_prompt: Tensor, pictures: int, preset: str, seed: int) -> dict[str, Any]:
    """What is reported of one metric: its mean with interval, over how much, and by which protocol.

    Args:
        per_prompt: [P], NaN where a prompt could not be measured: those are counted, not averaged.
        pictures: that were measured.
        preset: the protocol, in words.
        seed: of the bootstrap.

    Returns:
        value, low, high, n and preset. One prompt alone has no interval, and none measured no value: None.
    """
    measured = per_prompt[~per_prompt.isnan()]
    n = {"prompts": len(measured), "pictures": pictures, "prompts_not_measured": len(per_prompt) - len(measured)}
    found: dict[str, float | None] = {"value": None, "low": None, "high": None}
    if len(measured) == 1:
        found["value"] = measured.double().item()
    elif len(measured):
        found |= interval(measured, seed)
    return found | {"n": n, "preset": preset}


def ratio_interval(marks: Tensor, owners: Tensor, seed: int) -> dict[str, float | None]:
    """Mean of marks of pictures with a 95 % bootstrap interval over prompts, which may own unequal numbers of them.

    Args:
        marks: [n], one a picture.
        owners: [n], number of its prompt.
        seed: of the resampling.

    Returns:
        value, low, high; no interval for one prompt.
    """
    prompts, number = owners.unique(return_inverse=True)
    rows = torch.zeros(2, len(prompts), dtype=torch.float64)
    rows[0].index_add_(0, number, marks.double())
    rows[1].index_add_(0, number, torch.ones_like(marks, dtype=torch.float64))
    found: dict[str, float | None] = {"value": marks.double().mean().item(), "low": None, "high": None}
    if len(prompts) > 1:
        sums, counts = _resampled_means(rows, seed)
        found |= percentiles(sums / counts)
    return found


def gap_figure(teacher: Tensor, dmd: Tensor, ours: Tensor, seed: int) -> dict[str, float | None]:
    """Share of the gap recovered with a 95 % interval, prompts resampled together in all three.

    Args:
        teacher, dmd, ours: [P] each, of the same prompts in the same order.
        seed: of the bootstrap.

    Returns:
        value, low, high: None where DMD lost nothing; no interval where more than one resample in forty has no gap.
    """
    rows = torch.stack([teacher, dmd, ours]).double()
    value = gap_recovered(*rows.mean(1).tolist())
    found: dict[str, float | None] = {"value": value, "low": None, "high": None}
    if value is None or rows.shape[1] < 2:
        return found
    means = _resampled_means(rows, seed)
    gaps = means[0] - means[1]
    if (gaps <= 0).double().mean() < 0.025:
        shares = ((means[2] - means[1]) / gaps)[gaps > 0]
        found |= percentiles(shares)
    return found


def gap_recovered(teacher: float, dmd: float, ours: float) -> float | None:
    """(ours - DMD) / (teacher - DMD): 0 is DMD's diversity, 1 the teacher's; None where DMD lost nothing."""
    return (ours - dmd) / (teacher - dmd) if teacher > dmd else None
