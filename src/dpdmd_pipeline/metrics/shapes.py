"""Quality and diversity on the embedded world, read from pixels without a network.

Diversity counts the modes of a prompt that a model draws: [P, K] for K modes of each of P prompts. Effective modes is
the main number: the agreement that it inverts is unbiased at any number of samples, while coverage saturates and
entropy needs many. The inverse is a little too high: a perfect sampler of 72 modes scores 74.6 on average from 64
pictures. Compare numbers only at the same number of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.diversity import pairwise_distance
from dpdmd_pipeline.metrics.summary import interval
from dpdmd_pipeline.shapes.reader import Reading, read
from dpdmd_pipeline.shapes.world import FREE, FREE_COUNTS, FREE_WORDS, NUM_MODES, prompt_index

QUALITY = ("valid", "aligned", "residual")
DIVERSITY = ("effective_modes", "coverage", "entropy")


def judge(images: Sequence[Tensor], prompts: Sequence[str], seed: int) -> dict[str, dict]:
    """Quality and diversity of one model, each number a mean over prompts with its bootstrap interval.

    Args:
        images: pictures of each prompt, as in `judge_prompt`.

    Returns:
        Under `quality` the numbers QUALITY, under `diversity` DIVERSITY and pairwise_distance.
    """
    rows = [judge_prompt(pictures, prompt) for pictures, prompt in zip(images, prompts, strict=True)]
    for row, pictures in zip(rows, images, strict=True):
        row["pairwise_distance"] = torch.tensor(pairwise_distance(pictures))
    return {
        axis: {name: interval(torch.stack([row[name] for row in rows]), seed) for name in names}
        for axis, names in (("quality", QUALITY), ("diversity", (*DIVERSITY, "pairwise_distance")))
    }


def judge_prompt(pictures: Tensor, prompt: str) -> dict[str, Tensor]:
    """Scalars QUALITY and DIVERSITY of the pictures [n, 3, H, W] in [0, 1] of one prompt."""
    reading, aligned = _read(pictures, prompt)
    counts = count_modes(reading.mode[aligned], NUM_MODES)[None]
    return {
        "valid": reading.valid.double().mean(),
        "aligned": aligned.double().mean(),
        "residual": reading.residual.double().mean(),
        "effective_modes": effective_modes(counts)[0],
        "coverage": coverage(counts)[0],
        "entropy": entropy(counts)[0],
    }


def mode_counts(pictures: Tensor, prompt: str) -> Tensor:
    """Number of valid pictures that show the prompt for each mode, [NUM_MODES]; pictures are as in `judge_prompt`."""
    reading, aligned = _read(pictures, prompt)
    return count_modes(reading.mode[aligned], NUM_MODES)


def _read(pictures: Tensor, prompt: str) -> tuple[Reading, Tensor]:
    """Reading, and True for pictures that are valid and show the prompt: rubbish must not pass for diversity."""
    reading = read(pictures)
    return reading, reading.valid & (reading.prompt == prompt_index(prompt))


def attribute_counts(modes: Tensor) -> dict[str, dict[str, int]]:
    """Number of pictures for each value of each free attribute, keyed by their words, from counts [NUM_MODES]."""
    grid = modes.view([FREE_COUNTS[name] for name in FREE])
    counts = {}
    for axis, name in enumerate(FREE):
        others = [other for other in range(len(FREE)) if other != axis]
        counts[name] = dict(zip(FREE_WORDS[name], torch.sum(grid, others).int().tolist(), strict=True))
    return counts


def count_modes(modes: Tensor, num_modes: int) -> Tensor:
    """Counts [K] of mode indices [n]."""
    return torch.bincount(modes, minlength=num_modes).double()


def effective_modes(counts: Tensor) -> Tensor:
    """1 / P(two samples of a prompt agree on every free attribute), [P]: inverse Simpson, from pairs.

    Without an agreeing pair the value is n(n-1) / 2, as if there were one; with fewer than two samples it is 0.
    """
    total = counts.sum(1)
    pairs = total * (total - 1)
    agreeing = (counts * (counts - 1)).sum(1)
    return torch.where(pairs > 0, pairs / agreeing.clamp(min=2), torch.zeros_like(pairs))


def coverage(counts: Tensor) -> Tensor:
    """Share of the K modes with at least one sample, [P]; a uniform sampler of n reaches 1 - (1 - 1/K)^n."""
    return (counts > 0).double().mean(1)


def entropy(counts: Tensor) -> Tensor:
    """Shannon entropy of the modes in bits with the Miller-Madow correction, [P]; 0 without samples."""
    counts = counts.double()
    total = counts.sum(1, keepdim=True)
    share = counts / total.clamp(min=1)
    plain = -(share * share.clamp(min=1e-300).log2()).sum(1)
    nonzero = (counts > 0).sum(1)
    return torch.where(total[:, 0] > 0, plain + (nonzero - 1) / (2 * total[:, 0].clamp(min=1) * math.log(2)), plain)
