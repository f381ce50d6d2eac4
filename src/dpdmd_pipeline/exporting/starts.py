"""The first part of a picture, drawn by something else than the student, which finishes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, conditioned, guided
from dpdmd_pipeline.backbones.options import PromptNoise, TeacherStart
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import rollout, sample_seeds


@dataclass(frozen=True)
class Start:
    """A replacement of a student's first sampling steps."""

    landing: int  # number of the replaced steps
    # conditioning of B prompts, noise [B, C, H, W], seeds -> latents [B, C, H, W] at the student's level `landing`
    begin: Callable[[Conditioning, Tensor, Sequence[int]], Tensor]


def start_with_teacher(
    backbone: Backbone,
    teacher: nn.Module,
    uncond: Conditioning,
    levels: NoiseLevel,
    options: TeacherStart,
    scale: float | None,
) -> Start:
    """Let the teacher walk from pure noise to one of the student's levels, with steps of its own.

    Args:
        uncond: embeddings of the empty prompt, a batch of 1.
        levels: the student's schedule, [N + 1].
        scale: the teacher's own guidance, for options that name none.

    Raises:
        ValueError: if no step is left to the student, or the levels between are too close for the teacher's steps.
    """
    options.check_landing(len(levels) - 1)
    between = levels_between(backbone, levels[0], levels[options.landing], options.steps)
    if options.guidance_scale is not None:
        scale = options.guidance_scale

    def begin(cond: Conditioning, noise: Tensor, _seeds: Sequence[int]) -> Tensor:
        return rollout(guided(backbone, teacher, cond, uncond, scale), noise, between)

    return Start(options.landing, begin)


def levels_between(backbone: Backbone, start: NoiseLevel, end: NoiseLevel, steps: int) -> NoiseLevel:
    """Levels from `start` to `end` at equal distances of the network's timestep, both included, [steps + 1]."""
    if backbone.prediction == "flow":
        grid = torch.linspace(start.sigma.item(), end.sigma.item(), steps + 1)
    else:  # a table has whole timesteps
        grid = torch.linspace(start.timestep.item(), end.timestep.item(), steps + 1).round()
    return backbone.student_schedule(grid.tolist(), steps + 1)[:-1]


def noise_the_prompt(backbone: Backbone, student: nn.Module, levels: NoiseLevel, options: PromptNoise) -> Start:
    """Let the student take its first step under embeddings with noise, which depends on the picture's seed."""

    def begin(cond: Conditioning, noise: Tensor, seeds: Sequence[int]) -> Tensor:
        texts = {name: value for name, value in cond.items() if not name.endswith("_mask")}
        changed = cond | {name: _with_noise(value, name, seeds, options) for name, value in texts.items()}
        return rollout(conditioned(backbone, student, changed), noise, levels[:2])

    return Start(1, begin)


def _with_noise(embeddings: Tensor, name: str, seeds: Sequence[int], options: PromptNoise) -> Tensor:
    """Add uniform noise to a share of each sample's values; both depend on its seed and on the embeddings' name."""
    streams = [sample_seeds(seed, f"prompt noise/{name}", 0, 1)[0] for seed in seeds]
    draws = torch.stack([torch.rand(2, *embeddings.shape[1:], generator=_generator(seed)) for seed in streams])
    chosen, noise = draws.to(embeddings).unbind(1)
    return embeddings + (chosen < options.share) * options.strength * (2 * noise - 1)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
