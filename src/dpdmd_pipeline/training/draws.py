"""Random draws of a run, each a function of (seed, stream, purpose, update, batch index).

So a resumed run repeats an uninterrupted one bit for bit. Neither the number of processes nor the size of the
micro-batches changes a sample's draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from dpdmd_pipeline.backbones.base import Backbone
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import Fresh, noise_from_seeds, sample_seeds, uniform_from_seeds
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.speed import onto

Sample = tuple[int, int]  # (number of the update in its stream, batch index)
Indices = TypeVar("Indices", bound=Sequence)


@dataclass(frozen=True)
class Draws:
    """Source of all random draws of a run."""

    backbone: Backbone  # of the noise's shape and of the levels
    seed: int  # of the run
    prompts: Sequence[int]  # training prompts, as rows of the embeddings
    renoise: bool  # the student adds fresh noise between its sampling steps
    device: torch.device  # of the noise

    def batch(self, stream: str, update: int, batch_indices: Sequence[int]) -> SampleDraws:
        """Draws of some samples of one update's global batch."""
        return SampleDraws(self, stream, [(update, index) for index in batch_indices])


@dataclass(frozen=True)
class SampleDraws:
    """Draws of B samples of one stream."""

    source: Draws
    stream: str
    samples: Sequence[Sample]

    def seeds(self, purpose: str) -> list[int]:
        """One seed per sample."""
        name, run_seed = f"{self.stream}/{purpose}", self.source.seed
        return [sample_seeds(run_seed, name, update, [index])[0] for update, index in self.samples]

    def prompts(self) -> list[int]:
        """A training prompt per sample, as rows of the embeddings."""
        rows = self.source.prompts
        return [rows[seed % len(rows)] for seed in self.seeds("prompt")]

    def noise(self, purpose: str = "noise") -> Tensor:
        """Unit Gaussian noise, [B, C, H, W]."""
        return onto(self.source.device, noise_from_seeds(self.seeds(purpose), self.source.backbone.latent_shape))

    def level(self) -> NoiseLevel:
        """Random levels, [B, 1, 1, 1], at which L_DMD and the fake score train."""
        return self.source.backbone.random_level(uniform_from_seeds(self.seeds("level")))

    def fresh(self) -> Fresh | None:
        """Noise between the student's sampling steps; None if it keeps the noise that its predictions imply."""
        return (lambda number: self.noise(f"between/{number}")) if self.source.renoise else None


def graded_step(recipe: Recipe, cycle: int) -> int | None:
    """Sampling step that L_DMD trains in a cycle, one for the whole batch; None for all, see `match_teacher`."""
    first, count = recipe.anchored_steps, recipe.num_steps
    if recipe.graded_steps == "random":
        (seed,) = sample_seeds(recipe.seed, "student/graded_step", cycle, 1)
        return first + seed % (count - first)
    return count - 1 if recipe.graded_steps == "last" else None


def size_of_cycle(run_seed: int, cycle: int, sizes: int) -> int:
    """Number of a cycle's picture size: each size once in every `sizes` cycles, in random order."""
    turn, place = divmod(cycle, sizes)
    keys = sample_seeds(run_seed, "size", turn, sizes)
    return sorted(range(sizes), key=keys.__getitem__)[place]


def process_share(batch_size: int, process: int, processes: int) -> range:
    """Batch indices of one process; a ValueError if the batch cannot be shared evenly."""
    if batch_size % processes:
        raise ValueError(f"train.batch_size={batch_size} cannot be shared evenly by {processes} processes")
    share = batch_size // processes
    return range(process * share, (process + 1) * share)


def micro_batches(indices: Indices, size: int) -> Iterator[Indices]:
    """Consecutive slices of at most `size` entries."""
    return (indices[start : start + size] for start in range(0, len(indices), size))
