"""Counts of the attributes that prompts of the embedded world leave free."""

from __future__ import annotations

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.modes import count_modes
from dpdmd_pipeline.shapes.reader import read
from dpdmd_pipeline.shapes.world import FREE, FREE_COUNTS, FREE_WORDS, NUM_MODES, prompt_index


def mode_counts(pictures: Tensor, prompt: str) -> Tensor:
    """Number of pictures of each mode, over pictures that are valid and show the prompt, [NUM_MODES].

    Args:
        pictures: [n, 3, H, W] in [0, 1].
        prompt: text of a prompt of the shapes world.
    """
    reading = read(pictures)
    aligned = reading.valid & (reading.prompt == prompt_index(prompt))
    return count_modes(reading.mode[aligned], NUM_MODES)


def attribute_counts(modes: Tensor) -> dict[str, dict[str, int]]:
    """Number of pictures for each value of each free attribute, keyed by their words.

    Args:
        modes: counts [NUM_MODES].
    """
    grid = modes.view([FREE_COUNTS[name] for name in FREE])
    counts = {}
    for axis, name in enumerate(FREE):
        others = [other for other in range(len(FREE)) if other != axis]
        counts[name] = dict(zip(FREE_WORDS[name], torch.sum(grid, others).int().tolist(), strict=True))
    return counts
