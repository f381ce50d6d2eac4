"""Sampling with any denoiser, and noise by the seed of an image, whatever its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise, step

_SEEDS = 2**32  # a Mersenne Twister is seeded with 32 bits

# (latents [B, C, H, W], level) -> x0 [B, C, H, W] in float32
Denoise = Callable[[Tensor, NoiseLevel], Tensor]

# Number of the finished sampling step, from 0 -> fresh noise [B, C, H, W] for the next one
Fresh = Callable[[int], Tensor]


def trajectory(
    denoise: Denoise, latents: Tensor, levels: NoiseLevel, fresh: Fresh | None = None, first: int = 0
) -> Iterator[Tensor]:
    """Latents after each sampling step from `levels[0]` to `levels[-1]`: len(levels) - 1 tensors [B, C, H, W].

    Args:
        levels: a schedule, or a part of one.
        fresh: None keeps the noise that a prediction implies (an ODE sampler). Otherwise each step re-noises its
            prediction with `fresh(number of the step)`, as DMD2's sampler does.
        first: number of the first step, if `levels` is a later part of a schedule.
    """
    for number, (level, following) in enumerate(zip(levels[:-1], levels[1:], strict=True), start=first):
        latents = advance(latents, denoise(latents, level), level, following, fresh and fresh(number))
        yield latents


def advance(
    latents: Tensor, denoised: Tensor, level: NoiseLevel, following: NoiseLevel, fresh: Tensor | None
) -> Tensor:
    """Move from one level to the next, with the noise that `denoised` implies or with fresh noise."""
    return step(latents, denoised, level, following) if fresh is None else add_noise(denoised, fresh, following)


def rollout(
    denoise: Denoise, latents: Tensor, levels: NoiseLevel, fresh: Fresh | None = None, first: int = 0
) -> Tensor:
    """Latents at `levels[-1]`, reached step by step from `latents` at `levels[0]`; gradients flow."""
    last = latents
    for last in trajectory(denoise, latents, levels, fresh, first):  # noqa: B007
        pass
    return last


def noise_from_seeds(seeds: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
    """Unit Gaussian noise [B, *shape] in float32 on the CPU: a seed means the same in every batch.

    Args:
        seeds: B integers in [0, 2^32); torch's CPU generator ignores further bits.
        shape: of one sample, (C, H, W).

    Raises:
        ValueError: if a seed is out of range; it would silently give the image of another seed.
    """
    return noises_from_seeds(seeds, shape, 1)[0]


def noises_from_seeds(seeds: Sequence[int] | Tensor, shape: Sequence[int], count: int) -> list[Tensor]:
    """`count` successive draws of each sample's generator, each [B, *shape].

    The first is the start noise, as in `noise_from_seeds`; a re-noising sampler adds the others.
    """
    draws = [[torch.randn(*shape, generator=generator) for _ in range(count)] for generator in _generators(seeds)]
    return [torch.stack(list(draw)) for draw in zip(*draws, strict=True)]


def uniform_from_seeds(seeds: Sequence[int] | Tensor) -> Tensor:
    """One uniform number in [0, 1) per sample, [B] in float32 on the CPU, from the same generators."""
    return torch.cat([torch.rand(1, generator=generator) for generator in _generators(seeds)])


def _generators(seeds: Sequence[int] | Tensor) -> Iterator[torch.Generator]:
    """One generator, reseeded for each sample."""
    generator = torch.Generator()
    for seed in seeds:
        if not 0 <= int(seed) < _SEEDS:
            raise ValueError(f"seed {int(seed)} is out of range: give 0 to {_SEEDS - 1}")
        yield generator.manual_seed(int(seed))


def sample_seeds(run_seed: int, stream: str, step: int, samples: int | Sequence[int]) -> list[int]:
    """Seeds of one update's samples, independent of how the batch is split; there is no state to resume.

    Args:
        stream: purpose of the seeds; streams are independent.
        step: number of the update.
        samples: number of samples, or their indices in the global batch.
    """
    indices = range(samples) if isinstance(samples, int) else samples
    digests = (hashlib.sha256(f"{run_seed}/{stream}/{step}/{index}".encode()).digest() for index in indices)
    return [int.from_bytes(digest[:8], "big") % _SEEDS for digest in digests]
