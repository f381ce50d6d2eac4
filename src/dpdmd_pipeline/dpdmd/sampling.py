"""Sampling with any denoiser, and noise that belongs to a picture, not to a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel, step

_SEEDS = 2**32  # a Mersenne Twister is seeded with 32 bits

# (latents [B, C, H, W], level) -> x0 [B, C, H, W] in float32
Denoise = Callable[[Tensor, NoiseLevel], Tensor]


def trajectory(denoise: Denoise, latents: Tensor, levels: NoiseLevel) -> Iterator[Tensor]:
    """Latents after each step from `levels[0]` to `levels[-1]`: len(levels) - 1 tensors [B, C, H, W]."""
    for level, following in zip(levels[:-1], levels[1:], strict=True):
        latents = step(latents, denoise(latents, level), level, following)
        yield latents


def rollout(denoise: Denoise, latents: Tensor, levels: NoiseLevel) -> Tensor:
    """Latents at `levels[-1]`, reached step by step from `latents` at `levels[0]`; gradients flow."""
    last = latents
    for last in trajectory(denoise, latents, levels):  # noqa: B007
        pass
    return last


def noise_from_seeds(seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise, one CPU generator per sample, so that a seed means the same in every batch.

    Args:
        seeds: B integers in [0, 2^32): torch's CPU generator looks at no more bits.
        shape: of one sample, (C, H, W).

    Returns:
        [B, *shape] in float32 on the CPU.

    Raises:
        ValueError: for a seed out of range, which would silently mean another seed's picture.
    """
    return torch.stack([torch.randn(*shape, generator=generator) for generator in _generators(seeds)])


def uniform_from_seeds(seeds: Sequence[int] | Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample, [B] in float32 on the CPU, from generators as above."""
    return torch.cat([torch.rand(1, generator=generator) for generator in _generators(seeds)])


def _generators(seeds: Sequence[int] | Tensor) -> Iterator[torch.Generator]:
    """The same generator, seeded anew for each sample."""
    generator = torch.Generator()
    for seed in seeds:
        if not 0 <= int(seed) < _SEEDS:
            raise ValueError(f"seed {int(seed)} is out of range: give 0 to {_SEEDS - 1}")
        yield generator.manual_seed(int(seed))


def sample_seeds(run_seed: int, stream: str, step: int, count: int) -> list[int]:
    """Seeds of `count` samples of one step: the same however a batch is split, and without state to resume.

    Args:
        run_seed: of the whole run.
        stream: what the seeds are for; streams are independent.
        step: which step of the run.
        count: samples of the global batch.
    """
    digests = (hashlib.sha256(f"{run_seed}/{stream}/{step}/{index}".encode()).digest() for index in range(count))
    return [int.from_bytes(digest[:8], "big") % _SEEDS for digest in digests]
