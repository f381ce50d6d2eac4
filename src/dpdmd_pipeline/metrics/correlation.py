"""Spearman's rank correlation of two metrics over prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.summary import resamples, with_percentiles

_EXACT = "diversity.shapes.effective_modes"


def ranks(values: Tensor) -> Tensor:
    """Position of each value among those of its row, [..., n] in float64; equal values share their mean position."""
    values = values.double().contiguous()
    order = values.sort(dim=-1).values
    below, not_above = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (below + not_above - 1).double() / 2


def rank_correlation(one: Tensor, two: Tensor) -> Tensor:
    """Pearson's correlation of the ranks, [...] of [..., n]; NaN where one of the two is constant."""
    centred = [side - side.mean(-1, keepdim=True) for side in (ranks(one), ranks(two))]
    spread = centred[0].square().sum(-1) * centred[1].square().sum(-1)
    return (centred[0] * centred[1]).sum(-1) / spread.sqrt()


def pooled(one: Tensor, two: Tensor) -> Tensor:
    """Rank correlation over all models and prompts together, [...] of [..., models, prompts]."""
    return rank_correlation(one.flatten(-2), two.flatten(-2))


def within(one: Tensor, two: Tensor) -> Tensor:
    """Mean over the models of the rank correlation over prompts, [...] of [..., models, prompts].

    Differences between models, which may be all that `pooled` sees, do not count. A model is left out if a metric is
    constant over its prompts; NaN if no model remains.
    """
    return rank_correlation(one, two).nanmean(-1)


def correlation_figure(
    one: Tensor, two: Tensor, correlate: Callable[[Tensor, Tensor], Tensor], seed: int
) -> dict[str, float | None]:
    """Correlation, `pooled` or `within`, of two metrics [models, prompts] with a 95 % bootstrap interval over prompts.

    Returns:
        value, low, high: all None where nothing is ranked; no interval where 1 resample in 40 has nothing to rank.
    """
    value = correlate(one, two).item()
    if value != value or one.shape[1] < 2:
        return with_percentiles(None if value != value else value, None)
    chunks = []
    for index in resamples(one.shape[1], seed):  # [models, resamples, prompts] to [resamples, models, prompts]
        chunks.append(correlate(one[:, index].transpose(0, 1), two[:, index].transpose(0, 1)))
    resampled = torch.cat(chunks)
    ranked = resampled[~resampled.isnan()]
    return with_percentiles(value, ranked if len(ranked) > 0.975 * len(resampled) else None)


def rank_correlations(tables: Sequence[Mapping[str, Mapping[str, float]]], seed: int) -> dict[str, dict[str, Any]]:
    """Rank correlation of each diversity metric with the exact reader's effective modes.

    Args:
        tables: per model: full name of a metric -> prompt id -> value.

    Returns:
        Full name -> the pooled figure, with the figure within models under `within`. Only prompts count that have both
        values in all models. {} if a model lacks the exact reader's values.
    """
    names = tables[0] if all(_EXACT in table for table in tables) else {}
    figures = {}
    for name in names:
        if not name.startswith("diversity.") or name.startswith("diversity.shapes."):
            continue
        prompts = [key for key in tables[0][_EXACT] if all(key in table.get(name, {}) for table in tables)]
        one, two = (
            torch.tensor([[table[metric][key] for key in prompts] for table in tables], dtype=torch.float64)
            for metric in (_EXACT, name)
        )
        figures[name] = {
            **correlation_figure(one, two, pooled, seed),
            "within": correlation_figure(one, two, within, seed),
            "n": {"prompts": len(prompts), "models": len(tables)},
            "preset": f"Spearman's, with {_EXACT}",
        }
    return figures
