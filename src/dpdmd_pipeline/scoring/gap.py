"""The share of diversity lost by DMD that another model wins back, for every metric of diversity."""

from __future__ import annotations

from typing import Any

import torch

from dpdmd_pipeline.metrics.summary import gap_figure
from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.wording import grouped

_ANY_NUMBER = ("one_minus_cosine", "mean_distance")  # means over pairs; the others depend on the number of pictures


def gaps_recovered(
    teacher: Scores, dmd: Scores, ours: Scores, seed: int
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Share of DMD's loss that ours wins back, for every diversity metric that all three have.

    A prompt counts if all three could measure it and, for metrics that depend on the number of pictures, have equal
    numbers of usable pictures.

    Returns:
        By full name of the figure: value, low, high, prompts, preset. Then notes on gaps without some or all prompts,
        one line per reason.
    """
    gaps, reasons = {}, []
    for name in (name for name in ours.per_prompt if name.startswith("diversity.")):
        prompts, uneven = _compared(name, teacher, dmd, ours)
        if uneven:
            of = f"{uneven} of {len(prompts) + uneven} prompts, whose numbers of usable pictures"
            reasons.append((f"the gap leaves out {of} differ between the three models", name))
        elif not prompts:
            reasons.append(("no gap: no prompt was measured in all three", name))
        if prompts:
            sign = -1 if name.endswith(".duplicate_rate") else 1  # fewer duplicates are more diverse
            tables = [scores.per_prompt[name] for scores in (teacher, dmd, ours)]
            rows = [sign * torch.tensor([table[key] for key in prompts], dtype=torch.float64) for table in tables]
            gaps[name] = gap_figure(*rows, seed) | {"prompts": len(prompts), "preset": ours.figures[name]["preset"]}
    return gaps, [f"{', '.join(names)}: {reason}" for reason, names in grouped(reasons).items()]


def _compared(name: str, *models: Scores) -> tuple[list[str], int]:
    """Prompts of a figure's comparison, and the number of prompts dropped for unequal numbers of pictures."""
    tables = [scores.per_prompt.get(name, {}) for scores in models]
    shared = [key for key in tables[-1] if all(key in table for table in tables)]
    metric, number = name.rsplit(".", 1)
    if number in _ANY_NUMBER:
        return shared, 0
    usable = [scores.usable.get(metric, {}) for scores in models]
    equal = [key for key in shared if len({table.get(key) for table in usable}) == 1]
    return equal, len(shared) - len(equal)
