"""The three losses: tensors in, scalar out, each one equation."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel

Space = Literal["x0", "v", "eps"]
Normalizer = Literal["noisy", "x0"]


def diversity_loss(denoised: Tensor, target: Tensor, level: NoiseLevel, space: Space) -> Tensor:
    """L_div: squared error of the student's first prediction (arXiv:2602.03139, eq. 7 and 41).

    Args:
        denoised: predicted x0, [B, C, H, W].
        target: x0 that leads to the anchor.
        space: space of the squared error. ``v`` is the velocity of flow models and the v-prediction of VP models (both
            are x0 / sigma up to a term that the latents fix); ``eps`` is the noise; ``x0`` the clean latent. At an
            SDXL start x0 weighs an error 214 times as much as eps does (eq. 41 against progressive distillation).
    """
    weight = {"x0": 1.0, "v": 1 / level.sigma**2, "eps": (level.alpha / level.sigma) ** 2}[space]
    return (weight * (denoised - target).square()).mean()


def dmd_loss(x0: Tensor, noisy: Tensor, real: Tensor, fake: Tensor, normalizer: Normalizer) -> Tensor:
    """L_DMD: its gradient in `x0` is (fake - real) / scale, per element and sample mean (arXiv:2405.14867).

    Args:
        x0: samples of the student, [B, C, H, W], with gradient.
        noisy: the same re-noised.
        real, fake: x0 predicted from `noisy` by the teacher and by the fake score.
        normalizer: scale is mean|noisy - real| (``noisy``, published DP-DMD) or mean|x0 - real| (``x0``, DMD2).
    """
    with torch.no_grad():
        reference = noisy if normalizer == "noisy" else x0
        scale = (reference - real).abs().mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
        target = x0 - (fake - real) / scale
    return 0.5 * F.mse_loss(x0, target)


def fake_score_loss(denoised: Tensor, x0: Tensor, level: NoiseLevel) -> Tensor:
    """Loss of the fake score, ((denoised - x0) / sigma)^2: the velocity loss of flow and of VP models.

    `denoised` is predicted from re-noised samples x0 of the student, [B, C, H, W], which carry no gradient.
    """
    return ((denoised - x0) / level.sigma).square().mean()
