"""Diversity of pictures from their pixels alone."""

from __future__ import annotations

import torch
from torch import Tensor


def pairwise_distance(images: Tensor) -> float:
    """Mean RMS difference over all pairs of a prompt's pictures.

    Args:
        images: [n, 3, H, W] in [0, 1], n at least 2.

    Raises:
        ValueError: with fewer than two pictures.
    """
    if len(images) < 2:
        raise ValueError(f"pairwise distance needs at least 2 pictures of a prompt, got {len(images)}")
    flat = images.flatten(1).double()
    return (torch.pdist(flat) / flat.shape[1] ** 0.5).mean().item()
