"""Anchors, the teacher's latents after K steps, and the x0 that takes the student there in one step."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import Denoise, trajectory


class AnchoredStep(NamedTuple):
    """A sampling step of the student that follows the teacher."""

    latents: Tensor  # start of the step, [B, C, H, W] at `level`
    level: NoiseLevel  # scalar level of the start
    target: Tensor  # the x0 that the student should predict there, [B, C, H, W]


def anchor_target(noise: Tensor, anchor: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
    """The x0 whose single step from `noise` lands exactly on the teacher's `anchor` (the secant target).

    For flow models at sigma 1 this is DP-DMD's v = (noise - anchor) / (1 - sigma_K), eq. 6, written as
    x0 (arXiv:2602.03139); for VP models, the target of arXiv:2202.00512 with K steps in one.

    Args:
        noise: latents at level `start`, [B, C, H, W]; pure noise, or an earlier anchor.
        anchor: teacher latents at level `end`, same shape, in scaled VAE units, as is the target.
        start, end: scalar levels that have passed `check_falling`, which reads them: on a GPU that takes a wait.
    """
    ratio = end.sigma / start.sigma
    return (anchor - ratio * noise) / (end.alpha - ratio * start.alpha)


def check_falling(levels: Sequence[NoiseLevel]) -> None:
    """Raise a ValueError if a scalar level is not less noisy than the one before it."""
    for start, end in pairwise(levels):
        if not end.alpha - end.sigma / start.sigma * start.alpha > 0:
            raise ValueError(f"anchor level sigma {end.sigma:.3f} must be below the start level {start.sigma:.3f}")


def teacher_anchors(teacher: Denoise, noise: Tensor, levels: NoiseLevel, anchor_steps: Sequence[int]) -> list[Tensor]:
    """The teacher's latents after each of `anchor_steps` sampling steps, from one rollout.

    Args:
        noise: [B, C, H, W] at `levels[0]`.
        levels: the teacher's own schedule, [N + 1].
        anchor_steps: rising step counts K, each at least 1 and below N.

    Raises:
        ValueError: if the counts do not rise or reach past the schedule.
    """
    rising = all(before < after for before, after in zip((0, *anchor_steps), anchor_steps, strict=False))
    if not anchor_steps or not rising or anchor_steps[-1] >= len(levels) - 1:
        raise ValueError(
            f"anchor steps {list(anchor_steps)} must rise from 1 and stay below the teacher's {len(levels) - 1} steps"
        )
    path = trajectory(teacher, noise, levels[: anchor_steps[-1] + 1])
    return [latents for steps, latents in enumerate(path, start=1) if steps in anchor_steps]


def anchored_steps(
    noise: Tensor, anchors: Sequence[Tensor], start: NoiseLevel, ends: Sequence[NoiseLevel]
) -> list[AnchoredStep]:
    """Chain anchors into steps: from the noise to the first, from the first to the second, and so on.

    One anchor is the paper. With more, each later step starts at the teacher's own latents. `start` is the level of the
    noise; `ends` are the scalar levels of the anchors, which fall (see `check_falling`).
    """
    steps, latents, level = [], noise, start
    for anchor, end in zip(anchors, ends, strict=True):
        steps.append(AnchoredStep(latents, level, anchor_target(latents, anchor, level, end)))
        latents, level = anchor, end
    return steps
