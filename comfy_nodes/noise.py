"""Noise that belongs to a picture, not to a batch. Torch only.

Every picture has a CPU generator of its own, seeded with its seed. Its first draw is the picture's start noise; the
re-noise sampler takes the next draws. So a picture is the same alone and in any batch, on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_SEEDS = 2**64


def image_seeds(seed: int, batch_size: int, batch_index: Sequence[int] | None = None) -> tuple[int, ...]:
    """Seeds of a batch: seed + i for its picture i, modulo 2^64.

    PyTorch's CPU generator reads the lower 32 bits alone, so a seed and its remainder by 2^32 are one picture, and the
    remainder is what `dpdmd_pipeline.sample` takes, which refuses larger ones.

    Args:
        seed: of picture 0.
        batch_size: pictures in the latents.
        batch_index: which picture each one was in the batch it was taken from; ComfyUI keeps it in a LATENT.

    Raises:
        ValueError: if the latents hold another number of pictures than the index.
    """
    return tuple((seed + index) % _SEEDS for index in _places(batch_size, batch_index))


def _places(batch_size: int, batch_index: Sequence[int] | None) -> list[int]:
    """Which picture of its first batch each one is."""
    index = range(batch_size) if batch_index is None else batch_index
    if len(index) != batch_size:
        raise ValueError(f"batch_index names {len(index)} pictures, the latents hold {batch_size}: give one index each")
    return [int(place) for place in index]


class ImageStreams:
    """One stream of noise per picture."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise, [B, *shape] in float32 on the CPU; shape is one picture's."""
        return torch.stack([torch.randn(*shape, generator=generator) for generator in self.generators])


class BatchStream:
    """One stream for the whole batch, as in ComfyUI's own nodes: for the pictures that KSampler makes of a seed."""

    def __init__(self, seed: int, batch_size: int, batch_index: Sequence[int] | None = None) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.index = _places(batch_size, batch_index)

    def draw(self, shape: Sequence[int]) -> Tensor:
        """As `ImageStreams.draw`."""
        return torch.randn(max(self.index) + 1, *shape, generator=self.generator)[self.index]


Streams = ImageStreams | BatchStream


class SeedOfBatch(int):
    """A seed that knows its whole batch.

    ComfyUI hands a sampler one integer, and neither the noise nor the LATENT. This integer is picture 0's seed to
    everybody, and all seeds to our re-noise sampler.
    """

    seeds: tuple[int, ...]

    def __new__(cls, seed: int, seeds: Sequence[int]) -> SeedOfBatch:
        made = super().__new__(cls, seed)
        made.seeds = tuple(seeds)
        return made


def streams_of(seed: int, batch_size: int) -> ImageStreams:
    """The streams behind a sampler's seed: those of Per-Image Noise, else seed + i."""
    seeds = seed.seeds if isinstance(seed, SeedOfBatch) else image_seeds(seed, batch_size)
    return ImageStreams(seeds)


class PerImageNoise:
    """A NOISE for ComfyUI's advanced sampler: picture i gets what it would get alone with seed + i."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, latent: dict) -> Tensor:
        """Start noise like the samples of a LATENT, on the CPU."""
        samples = latent["samples"]
        seeds = image_seeds(int(self.seed), len(samples), latent.get("batch_index"))
        self.seed = SeedOfBatch(self.seed, seeds)  # the sampler asks for it next
        return ImageStreams(seeds).draw(samples.shape[1:]).to(samples.dtype)
