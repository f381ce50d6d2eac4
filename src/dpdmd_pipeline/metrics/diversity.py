"""How different the pictures of one prompt are, from their embeddings.

All take embeddings [n, d] of one prompt and normalise them themselves; all sums are in float64. Read them beside
quality, and beside the teacher's value at the same n: noise is diverse too, and all but the first depend on n.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROUNDING = 1e-9  # the cosine of exact copies is 1 but for the last bits


def _similarities(embeddings: Tensor) -> Tensor:
    """Cosines of all pairs, [n, n].

    Raises:
        ValueError: for fewer than two pictures.
    """
    if len(embeddings) < 2:
        raise ValueError(f"diversity needs at least 2 pictures of a prompt, got {len(embeddings)}")
    unit = F.normalize(embeddings.double(), dim=1)
    return unit @ unit.T


def one_minus_cosine(embeddings: Tensor) -> float:
    """1 - mean cosine over the pairs i < j: the diversity of arXiv:2602.03139. Unbiased at any n."""
    similarities = _similarities(embeddings)
    n = len(similarities)
    return 1 - ((similarities.sum() - similarities.trace()) / (n * (n - 1))).item()


def vendi_score(embeddings: Tensor) -> float:
    """exp of the entropy of the eigenvalues of K / n (arXiv:2210.02410): 1 for copies, n for orthogonal pictures."""
    kernel = _similarities(embeddings)
    values = torch.linalg.eigvalsh(kernel / len(kernel)).clamp(min=0)
    return (-torch.special.xlogy(values, values).sum()).exp().item()


def nearest_similarity(embeddings: Tensor) -> Tensor:
    """Cosine of each picture with the most similar other one, [n]."""
    return _similarities(embeddings).fill_diagonal_(-torch.inf).amax(1)


def duplicate_threshold(nearest: Tensor) -> float:
    """What counts as a near-duplicate: the 99th percentile of the teacher's own nearest similarities.

    Args:
        nearest: of all prompts, with as many pictures a prompt as will be judged: it grows with n.
    """
    return torch.quantile(nearest.double(), 0.99).item()


def duplicate_rate(nearest: Tensor, threshold: float) -> float:
    """Share of pictures with another one of the prompt at least as similar as the threshold.

    In a world of few pictures the teacher draws exact copies too: the threshold is 1 then, and copies must count.
    """
    return (nearest >= threshold - _ROUNDING).double().mean().item()
