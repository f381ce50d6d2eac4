"""Algorithm 1 of DP-DMD (arXiv:2602.03139), and the fake-score turn beside it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.anchor import AnchoredStep
from dpdmd_pipeline.dpdmd.losses import Normalizer, Space, diversity_loss, dmd_loss, fake_score_loss
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise, step
from dpdmd_pipeline.dpdmd.sampling import Denoise, rollout


class StudentLoss(NamedTuple):
    """The two terms of a student turn; `diversity` is unweighted and zero where no step is anchored."""

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
) -> StudentLoss:
    """One student turn: l = L_DMD + lambda L_div, both terms apart (eq. 8).

    Without anchored steps and stop-gradient this is vanilla DMD.

    Args:
        student, teacher, fake_score: denoisers; the teacher is guided.
        noise: where the student starts, [B, C, H, W] at `levels[0]`.
        anchored: the student's first steps as the teacher takes them; one in the paper, none in DMD.
        levels: the student's schedule, [N + 1].
        renoise: fresh noise for the DMD term, [B, C, H, W].
        level: per-sample levels for the DMD term.
        stop_gradient: whether L_DMD is kept from the anchored steps.
        normalizer, space: see `dmd_loss` and `diversity_loss`.
    """
    # First steps: go where the teacher goes from this noise. This is what keeps diversity.
    latents, errors = noise, []
    for index, lesson in enumerate(anchored):
        denoised = student(lesson.latents, lesson.level)
        errors.append(diversity_loss(denoised, lesson.target, lesson.level, space))
        if index > 0:  # later lessons start at the teacher's latents; the student goes on from its own
            with torch.no_grad() if stop_gradient else nullcontext():
                denoised = student(latents, levels[index])
        latents = step(latents, denoised, levels[index], levels[index + 1])
        if stop_gradient:
            latents = latents.detach()  # L_DMD must not reach the anchored steps
    diversity = torch.stack(errors).mean() if errors else noise.new_zeros(())

    # Remaining steps: match the teacher's distribution. This is what gives quality.
    x0 = rollout(student, latents, levels[len(anchored) :])
    noisy = add_noise(x0, renoise, level)
    with torch.no_grad():
        real, fake = teacher(noisy, level), fake_score(noisy, level)
    return StudentLoss(diversity, dmd_loss(x0, noisy, real, fake, normalizer))


def fake_score_turn_loss(
    student: Denoise, fake_score: Denoise, *, noise: Tensor, levels: NoiseLevel, renoise: Tensor, level: NoiseLevel
) -> Tensor:
    """One fake-score turn: denoise what the student draws now.

    Args:
        student, fake_score: denoisers; only the fake score receives gradients.
        noise: where the student starts, [B, C, H, W].
        levels: the student's schedule.
        renoise: fresh noise, [B, C, H, W].
        level: per-sample levels, [B, 1, 1, 1].
    """
    with torch.no_grad():
        x0 = rollout(student, noise, levels)
    return fake_score_loss(fake_score(add_noise(x0, renoise, level), level), x0, level)
