"""Bytes of the caches on disk."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dpdmd_pipeline.backbones.base import Conditioning


def embedding_bytes(cond: Conditioning, prompts: int) -> int:
    """Cache of embeddings: every prompt, and the empty one.

    Args:
        cond: embeddings of one prompt, or tensors like them.
        prompts: number of prompts.
    """
    return (prompts + 1) * sum(value[0].numel() * value.element_size() for value in cond.values())


def anchor_bytes(
    latent_shape: Sequence[int], samples: int, levels: int, *, with_denoised: bool, dtype: torch.dtype
) -> int:
    """Cache of anchors: prompt and seed of each sample, and its latents at each level."""
    latents = levels * (1 + with_denoised) * torch.Size(latent_shape).numel() * dtype.itemsize
    return samples * (2 * torch.int64.itemsize + latents)
