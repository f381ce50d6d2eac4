"""Quality and diversity on the embedded world, read from pixels without a network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.modes import count_modes, coverage, effective_modes, entropy
from dpdmd_pipeline.metrics.pixels import pairwise_distance
from dpdmd_pipeline.metrics.summary import interval
from dpdmd_pipeline.shapes.reader import read
from dpdmd_pipeline.shapes.world import NUM_MODES, prompt_index

QUALITY = ("valid", "aligned", "residual")
DIVERSITY = ("effective_modes", "coverage", "entropy")


def judge(images: Sequence[Tensor], prompts: Sequence[str], seed: int) -> dict[str, dict]:
    """Quality and diversity of one model.

    Modes count only in pictures that are valid and show the prompt: rubbish must not pass for diversity.

    Args:
        images: pictures of each prompt, [n, 3, H, W] in [0, 1].
        prompts: their texts, from the shapes world.
        seed: seed of the bootstrap.

    Returns:
        quality (valid, aligned, residual) and diversity (effective_modes, coverage, entropy,
        pairwise_distance), each a mean over prompts with its interval.
    """
    rows = [judge_prompt(pictures, prompt) for pictures, prompt in zip(images, prompts, strict=True)]
    for row, pictures in zip(rows, images, strict=True):
        row["pairwise_distance"] = torch.tensor(pairwise_distance(pictures))
    return {
        axis: {name: interval(torch.stack([row[name] for row in rows]), seed) for name in names}
        for axis, names in (("quality", QUALITY), ("diversity", (*DIVERSITY, "pairwise_distance")))
    }


def judge_prompt(pictures: Tensor, prompt: str) -> dict[str, Tensor]:
    """Scalars QUALITY and DIVERSITY of the pictures of one prompt.

    Args:
        pictures: [n, 3, H, W] in [0, 1].
        prompt: text of a prompt of the shapes world.
    """
    reading = read(pictures)
    aligned = reading.valid & (reading.prompt == prompt_index(prompt))
    counts = count_modes(reading.mode[aligned], NUM_MODES)[None]
    return {
        "valid": reading.valid.double().mean(),
        "aligned": aligned.double().mean(),
        "residual": reading.residual.double().mean(),
        "effective_modes": effective_modes(counts)[0],
        "coverage": coverage(counts)[0],
        "entropy": entropy(counts)[0],
    }
