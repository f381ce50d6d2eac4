"""Diversity of the pictures of one prompt, from their embeddings or pixels.

Embeddings [n, d] of one prompt are normalised, and sums are in float64. Compare at the same n, with the teacher's value
and with quality beside it: all but means over pairs depend on n, and noise is diverse too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDING = 1e-9  # exact copies have a cosine of 1 up to the last bits


def _similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs, [n, n]."""
    if len(embeddings) < 2:
        raise ValueError(f"diversity needs at least 2 pictures of a prompt, got {len(embeddings)}")
    unit = F.normalize(embeddings.double(), dim=1)
    return unit @ unit.T


def one_minus_cosine(embeddings: Tensor) -> float:
    """1 - mean cosine over the pairs i < j: the diversity of arXiv:2602.03139. Unbiased at any n."""
    similarities = _similarities(embeddings)
    n = len(similarities)
    mean = (similarities.sum() - similarities.trace()) / (n * (n - 1))
    return max(1 - mean.item(), 0.0)  # rounding makes it negative for copies


def vendi_score(embeddings: Tensor) -> float:
    """Exponential entropy of the eigenvalues of K / n (arXiv:2210.02410): 1 for copies, n for orthogonal pictures."""
    kernel = _similarities(embeddings)
    values = torch.linalg.eigvalsh(kernel / len(kernel)).clamp(min=0)
    return (-torch.special.xlogy(values, values).sum()).exp().item()


def nearest_similarity(embeddings: Tensor) -> Tensor:
    """Cosine of each picture with the most similar other one, [n]."""
    return _similarities(embeddings).fill_diagonal_(-torch.inf).amax(1)


def pairwise_distance(images: Tensor) -> float:
    """Mean RMS difference over all pairs of pictures [n, 3, H, W] in [0, 1]."""
    if len(images) < 2:
        raise ValueError(f"pairwise distance needs at least 2 pictures of a prompt, got {len(images)}")
    flat = images.flatten(1).double()
    return (torch.pdist(flat) / flat.shape[1] ** 0.5).mean().item()


def duplicate_threshold(nearest: Tensor) -> float:
    """Cosine from which pictures are near-duplicates: the 99th percentile of the teacher's nearest similarities.

    These must be of as many pictures per prompt as are judged, because they grow with n.
    """
    return torch.quantile(nearest.double(), 0.99).item()


def duplicate_rate(nearest: Tensor, threshold: float) -> float:
    """Share of pictures whose nearest other picture of the prompt reaches the threshold."""
    # In a small world the teacher draws exact copies: the threshold is 1 then, and copies must count.
    return (nearest >= threshold - _ROUNDING).double().mean().item()
