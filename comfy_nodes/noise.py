"""Noise that belongs to a picture, not to a batch. Torch only.

Every picture has its own CPU generator, seeded with its seed. The first draw is the picture's start noise; the re-noise
sampler takes the next draws. So a picture is the same alone and in any batch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

_SEEDS = 2**64


def image_seeds(seed: int, batch_size: int, batch_index: Sequence[int] | None = None) -> tuple[int, ...]:
    """Seeds of a batch: seed + i for picture i, modulo 2^64.

    PyTorch's CPU generator reads only the lower 32 bits: a seed and its remainder by 2^32 give one picture.
    `dpdmd_pipeline.sample` refuses larger seeds: give it the remainder.

    Args:
        seed: of picture 0.
        batch_size: pictures in the latents.
        batch_index: each picture's index in its original batch; ComfyUI keeps it in a LATENT.

    Raises:
        ValueError: if the seed is no whole number, or the index does not have one entry per picture.
    """
    seed = _whole_seed(seed)
    return tuple((seed + index) % _SEEDS for index in _original_indices(batch_size, batch_index))


def _whole_seed(seed: int) -> int:
    if not isinstance(seed, Integral):
        raise ValueError(f"seed is {seed}: set a whole number")
    return int(seed)


def _original_indices(batch_size: int, batch_index: Sequence[int] | None) -> list[int]:
    indices = range(batch_size) if batch_index is None else batch_index
    if len(indices) != batch_size:
        raise ValueError(
            f"batch_index names {len(indices)} pictures, the latents hold {batch_size}: give one index each"
        )
    return [int(index) for index in indices]


class ImageStreams:
    """One stream of noise per picture."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise, [B, *shape] in float32 on the CPU; shape is one picture's."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self.generators])


class BatchStream:
    """One stream for the whole batch, as ComfyUI's own nodes draw it; it reproduces KSampler's pictures."""

    def __init__(self, seed: int, batch_size: int, batch_index: Sequence[int] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(_whole_seed(seed))
        self.indices = _original_indices(batch_size, batch_index)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise, like `ImageStreams.draw`."""
        return torch.randn(max(self.indices) + 1, *shape, generator=self.generator)[self.indices]


Streams = ImageStreams | BatchStream


class BatchSeed(int):
    """A seed that knows its whole batch.

    ComfyUI hands a sampler one integer, and neither the noise nor the LATENT. To ComfyUI this integer is picture 0's
    seed; our re-noise sampler reads the seeds of all pictures from it.
    """

    seeds: tuple[int, ...]

    def __new__(cls, seed: int, seeds: Sequence[int]) -> BatchSeed:
        batch_seed = super().__new__(cls, seed)
        batch_seed.seeds = tuple(seeds)
        return batch_seed


def streams_of(seed: int, batch_size: int) -> ImageStreams:
    """The streams behind a sampler's seed: those of Per-Image Noise, else seed + i."""
    return ImageStreams(seed.seeds if isinstance(seed, BatchSeed) else image_seeds(seed, batch_size))


class PerImageNoise:
    """A NOISE for ComfyUI's advanced sampler: picture i gets the noise that seed + i gives alone."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, latent: dict) -> Tensor:
        """Start noise for a LATENT, in float32 on the CPU, with the shape of its samples.

        Nested samples (pictures and sound) get nested noise: a picture's stream gives one part after the other.
        """
        samples = latent["samples"]
        parts = samples.unbind() if samples.is_nested else [samples]
        seeds = image_seeds(self.seed, len(parts[0]), latent.get("batch_index"))
        self.seed = BatchSeed(self.seed, seeds)  # ComfyUI reads it next, for the sampler
        streams = ImageStreams(seeds)
        noises = [streams.draw(part.shape[1:]) for part in parts]
        return type(samples)(noises) if samples.is_nested else noises[0]
