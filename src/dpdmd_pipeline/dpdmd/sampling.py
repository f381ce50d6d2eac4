"""Sampling with any denoiser, and noise that belongs to a picture, not to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel, step

# (latents [B, C, H, W], level) -> x0 [B, C, H, W] in float32
Denoise = Callable[[Tensor, NoiseLevel], Tensor]


def trajectory(denoise: Denoise, latents: Tensor, levels: NoiseLevel) -> Iterator[Tensor]:
    """Latents after each step from `levels[0]` to `levels[-1]`: len(levels) - 1 tensors [B, C, H, W]."""
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        latents = step(latents, denoise(latents, level), level, following)
        yield latents


def rollout(denoise: Denoise, latents: Tensor, levels: NoiseLevel) -> Tensor:
    """Latents at `levels[-1]`, reached step by step from `latents` at `levels[0]`; gradients flow."""
    for latents in trajectory(denoise, latents, levels):  # noqa: B007
        pass
    return latents


def noise_from_seeds(seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise, one CPU generator per sample, so that a seed means the same in every batch.

    Args:
        seeds: B integers in [0, 2^63).
        shape: of one sample, (C, H, W).

    Returns:
        [B, *shape] in float32 on the CPU.
    """
    generator = torch.Generator()
    return torch.stack([torch.randn(*shape, generator=generator.manual_seed(int(seed))) for seed in seeds])


def uniform_from_seeds(seeds: Sequence[int] | Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample, [B] in float32 on the CPU, from generators as above."""
    generator = torch.Generator()
    return torch.cat([torch.rand(1, generator=generator.manual_seed(int(seed))) for seed in seeds])


def sample_seeds(run_seed: int, stream: str, step: int, count: int) -> list[int]:
    """Seeds of `count` samples of one step: the same however a batch is split, and without state to resume.

    Args:
        run_seed: of the whole run.
        stream: what the seeds are for; streams are independent.
        step: which step of the run.
        count: samples of the global batch.
    """
    digests = (hashlib.sha256(f"{run_seed}/{stream}/{step}/{index}".encode()).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") >> 1 for digest in digests]
