"""Whether two metrics put the same prompts first: Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.summary import percentiles, resamples

Correlate = Callable[[Tensor, Tensor], Tensor]

_EXACT = "diversity.shapes.effective_modes"


def ranks(values: Tensor) -> Tensor:
    """Position of each value among those of its row, [..., n] in float64; equal values share the mean of theirs."""
    values = values.double().contiguous()
    order = values.sort(dim=-1).values
    below, not_above = (torch.searchsorted(order, values, right=right) for right in (False, True))
    return (below + not_above - 1).double() / 2


def rank_correlation(one: Tensor, two: Tensor) -> Tensor:
    """Pearson's correlation of the ranks, [...] of [..., n]; NaN where one of the two is constant."""
    centred = [found - found.mean(-1, keepdim=True) for found in (ranks(one), ranks(two))]
    spread = centred[0].square().sum(-1) * centred[1].square().sum(-1)
    return (centred[0] * centred[1]).sum(-1) / spread.sqrt()


def pooled(one: Tensor, two: Tensor) -> Tensor:
    """Rank correlation over all models and prompts together, [...] of [..., models, prompts]."""
    return rank_correlation(one.flatten(-2), two.flatten(-2))


def within(one: Tensor, two: Tensor) -> Tensor:
    """Mean over the models of the rank correlation over prompts, [...] of [..., models, prompts].

    Differences between models, which may be all that `pooled` sees, do not count. A model that a metric gives one
    value for all its prompts is left out; NaN where that is each of them.
    """
    return rank_correlation(one, two).nanmean(-1)


def correlation_figure(one: Tensor, two: Tensor, correlate: Correlate, seed: int) -> dict[str, float | None]:
    """A correlation with a 95 % bootstrap interval over prompts.

    Args:
        one, two: a metric each, [models, prompts].
        correlate: `pooled` or `within`.
        seed: of the resampling.

    Returns:
        value, low, high: None where nothing is ranked, or where a resample in forty has nothing to rank.
    """
    value = correlate(one, two).item()
    found: dict[str, float | None] = {"value": None if value != value else value, "low": None, "high": None}
    count = one.shape[1]
    if found["value"] is None or count < 2:
        return found
    # [models, a few, prompts] to [a few, models, prompts]
    drawn = [correlate(*(side[:, index].transpose(0, 1) for side in (one, two))) for index in resamples(count, seed)]
    resampled = torch.cat(drawn)
    ranked = resampled[~resampled.isnan()]
    if len(ranked) > 0.975 * len(resampled):
        found |= percentiles(ranked)
    return found


def rank_correlations(tables: Sequence[Mapping[str, Mapping[str, float]]], seed: int) -> dict[str, dict[str, Any]]:
    """How far each diversity metric puts prompts and models in the order of the exact reader's effective modes.

    Args:
        tables: per model, full name of a metric to id of a prompt to value.
        seed: of the bootstrap.

    Returns:
        Full name to the pooled figure, and in it to one `within` the models; a prompt counts where all models have both
        values. {} where the reader has not read.
    """
    names = tables[0] if all(_EXACT in table for table in tables) else {}
    found = {}
    for name in names:
        if not name.startswith("diversity.") or name.startswith("diversity.shapes."):
            continue
        prompts = [key for key in tables[0][_EXACT] if all(key in table.get(name, {}) for table in tables)]
        one, two = (
            torch.tensor([[table[metric][key] for key in prompts] for table in tables], dtype=torch.float64)
            for metric in (_EXACT, name)
        )
        n = {"prompts": len(prompts), "models": len(tables)}
        found[name] = {
            **correlation_figure(one, two, pooled, seed),
            "within": correlation_figure(one, two, within, seed),
            "n": n,
            "preset": f"Spearman's, with {_EXACT}",
        }
    return found
