"""Algorithm 1 of DP-DMD (arXiv:2602.03139): losses of a student update and of a fake-score update."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.anchor import AnchoredStep
from dpdmd_pipeline.dpdmd.losses import Normalizer, Space, diversity_loss, dmd_loss, fake_score_loss
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise
from dpdmd_pipeline.dpdmd.sampling import Denoise, Fresh, advance, rollout


class StudentLoss(NamedTuple):
    """The two terms of a student update; `diversity` is unweighted, and zero without anchored steps."""

    diversity: Tensor
    dmd: Tensor


def student_loss(
    student: Denoise,
    teacher: Denoise,
    fake_score: Denoise,
    *,
    noise: Tensor,
    anchored: Sequence[AnchoredStep],
    levels: NoiseLevel,
    renoise: Tensor,
    level: NoiseLevel,
    stop_gradient: bool,
    normalizer: Normalizer,
    space: Space,
    fresh: Fresh | None = None,
    graded_step: int | None = None,
) -> StudentLoss:
    """Both terms of a student update, L_DMD + lambda L_div (eq. 8).

    Without anchored steps and stop-gradient this is vanilla DMD. Arguments as in `follow_anchors` and `match_teacher`.
    The training loop calls these two itself: L_div's backward pass frees its graph before the remaining steps begin.
    """
    # First steps: go where the teacher goes from this noise. This is what keeps diversity.
    diversity, latents = follow_anchors(
        student, noise=noise, anchored=anchored, levels=levels, stop_gradient=stop_gradient, space=space, fresh=fresh
    )
    # Remaining steps: match the teacher's distribution. This is what gives quality.
    dmd = match_teacher(
        student,
        teacher,
        fake_score,
        latents=latents,
        first=len(anchored),
        levels=levels,
        renoise=renoise,
        level=level,
        normalizer=normalizer,
        fresh=fresh,
        graded_step=graded_step,
    )
    return StudentLoss(diversity, dmd)


def follow_anchors(
    student: Denoise,
    *,
    noise: Tensor,
    anchored: Sequence[AnchoredStep],
    levels: NoiseLevel,
    stop_gradient: bool,
    space: Space,
    fresh: Fresh | None = None,
) -> tuple[Tensor, Tensor]:
    """The anchored steps.

    Args:
        noise: start of the student, [B, C, H, W] at `levels[0]`.
        anchored: the student's first steps as the teacher takes them; one in the paper, none in DMD.
        levels: the student's schedule, [N + 1].
        stop_gradient: block the gradient of L_DMD from these steps. The latents then carry no graph, so L_div can be
            back-propagated, and its activations freed, before the remaining steps begin.
        fresh: noise between the sampling steps, see `trajectory`.

    Returns:
        L_div, zero without anchored steps; the student's latents after these steps, [B, C, H, W].
    """
    latents, errors = noise, []
    for index, anchored_step in enumerate(anchored):
        denoised = student(anchored_step.latents, anchored_step.level)
        errors.append(diversity_loss(denoised, anchored_step.target, anchored_step.level, space))
        if index > 0:  # later targets start at the teacher's latents; the student goes on from its own
            with torch.no_grad() if stop_gradient else nullcontext():
                denoised = student(latents, levels[index])
        latents = advance(latents, denoised, levels[index], levels[index + 1], fresh and fresh(index))
        if stop_gradient:
            latents = latents.detach()  # L_DMD must not reach the anchored steps
    return (torch.stack(errors).mean() if errors else noise.new_zeros(())), latents


def match_teacher(
    student: Denoise,
    teacher: Denoise,
    fake_score: Denoise,
    *,
    latents: Tensor,
    first: int,
    levels: NoiseLevel,
    renoise: Tensor,
    level: NoiseLevel,
    normalizer: Normalizer,
    fresh: Fresh | None = None,
    graded_step: int | None = None,
) -> Tensor:
    """L_DMD of the sampling steps from number `first` on.

    Args:
        teacher: with guidance.
        latents: the student's latents after the anchored steps, [B, C, H, W] at `levels[first]`.
        first: number of anchored steps.
        levels: the student's schedule, [N + 1].
        renoise: fresh noise for the student's x0, [B, C, H, W].
        level: level of that noise per sample, [B, 1, 1, 1].
        fresh: noise between the sampling steps, see `trajectory`.
        graded_step: None sends the gradient through all remaining steps, as published. A number takes that step's
            prediction as x0 and grades that step alone (backward simulation of DMD2, arXiv:2405.14867 section 4.5):
            one graph in memory instead of N - first.
    """
    if graded_step is None:
        x0 = rollout(student, latents, levels[first:], fresh, first)
    else:
        with torch.no_grad():
            latents = rollout(student, latents, levels[first : graded_step + 1], fresh, first)
        x0 = student(latents, levels[graded_step])
    noisy = add_noise(x0, renoise, level)
    with torch.no_grad():
        real, fake = teacher(noisy, level), fake_score(noisy, level)
    return dmd_loss(x0, noisy, real, fake, normalizer)


@torch.no_grad()
def student_pictures(student: Denoise, noise: Tensor, levels: NoiseLevel, fresh: Fresh | None = None) -> Tensor:
    """Samples of the student, x0 [B, C, H, W], that the fake score trains on."""
    return rollout(student, noise, levels, fresh)


def fake_score_update_loss(fake_score: Denoise, *, x0: Tensor, renoise: Tensor, level: NoiseLevel) -> Tensor:
    """Loss of a fake-score update: denoise the student's samples x0, re-noised at a level per sample."""
    return fake_score_loss(fake_score(add_noise(x0, renoise, level), level), x0, level)
