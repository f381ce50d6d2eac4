"""Quality and diversity on the embedded world, read from pixels without any network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.modes import count_modes, coverage, effective_modes, entropy
from dpdmd_pipeline.metrics.pixels import pairwise_distance
from dpdmd_pipeline.metrics.summary import interval
from dpdmd_pipeline.shapes.reader import read
from dpdmd_pipeline.shapes.world import NUM_MODES, prompt_index


def judge(images: Sequence[Tensor], prompts: Sequence[str], seed: int) -> dict[str, dict]:
    """Quality and diversity of one model.

    Modes are counted over pictures that are valid and show what the prompt says: a model cannot earn
    diversity with rubbish.

    Args:
        images: per prompt, [n, 3, H, W] in [0, 1].
        prompts: their texts, each of the shapes world.
        seed: of the bootstrap.

    Returns:
        quality (valid, aligned, residual) and diversity (effective_modes, coverage, entropy,
        pairwise_distance), each a mean over prompts with its interval.
    """
    valid, aligned, residual, counts, distance = [], [], [], [], []
    for pictures, prompt in zip(images, prompts, strict=True):
        reading = read(pictures)
        right = reading.valid & (reading.prompt == prompt_index(prompt))
        valid.append(reading.valid.double().mean())
        aligned.append(right.double().mean())
        residual.append(reading.residual.double().mean())
        counts.append(count_modes(reading.mode[right], NUM_MODES))
        distance.append(torch.tensor(pairwise_distance(pictures)))
    table = torch.stack(counts)
    quality = {"valid": valid, "aligned": aligned, "residual": residual}
    diversity = {
        "effective_modes": effective_modes(table),
        "coverage": coverage(table),
        "entropy": entropy(table),
        "pairwise_distance": torch.stack(distance),
    }
    return {
        "quality": {name: interval(torch.stack(values), seed) for name, values in quality.items()},
        "diversity": {name: interval(values, seed) for name, values in diversity.items()},
    }
