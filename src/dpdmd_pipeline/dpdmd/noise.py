"""Noise levels, schedules and conversions: every model is a denoiser that returns x0.

A latent at a level is ``alpha * x0 + sigma * noise``. Flow matching has alpha = 1 - sigma; diffusion
models (VP) have alpha^2 + sigma^2 = 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class NoiseLevel:
    """One level (tensors of shape []), a level per sample ([B, 1, 1, 1]), or a schedule of levels ([N + 1])."""

    alpha: Tensor  # signal coefficient
    sigma: Tensor  # noise coefficient
    timestep: Tensor  # input of the network; used for nothing else

    def __len__(self) -> int:
        return len(self.sigma)

    def __getitem__(self, index: int | slice) -> NoiseLevel:
        return NoiseLevel(self.alpha[index], self.sigma[index], self.timestep[index])

    def __iter__(self) -> Iterator[NoiseLevel]:
        return (self[index] for index in range(len(self)))

    def to(self, device: torch.device | str) -> NoiseLevel:
        waits = torch.device(device).type == "cpu"  # values must have arrived before they are read there
        parts = self.alpha, self.sigma, self.timestep
        return NoiseLevel(*(part.to(device, non_blocking=not waits) for part in parts))


def flow_level(sigma: Tensor) -> NoiseLevel:
    """Flow-matching level: alpha = 1 - sigma, timestep = 1000 sigma."""
    return NoiseLevel(1 - sigma, sigma, NUM_TRAIN_TIMESTEPS * sigma)


def vp_level(timestep: Tensor, alphas_cumprod: Tensor) -> NoiseLevel:
    """Diffusion level at integer timesteps.

    `timestep` is int64 of any shape, `alphas_cumprod` [T] the model's own table, kept in its precision.
    """
    alpha_bar = alphas_cumprod[timestep]
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), timestep)


def noise_share(level: NoiseLevel) -> Tensor:
    """sigma / (alpha + sigma), same shape: sigma of a flow level, and the equivalent of a diffusion level."""
    return level.sigma / (level.alpha + level.sigma)


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """SD3's time shift: more of the schedule at high noise when shift > 1 (arXiv:2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_sigmas(
    num_steps: int, shift: float, grid: Literal["diffusers", "shifted"], terminal: float | None = None
) -> Tensor:
    """Falling noise levels of a flow sampler, [num_steps + 1] in float32, last 0.

    Args:
        shift: SD3's static shift.
        grid: ``shifted`` is linspace(1, 1/n, n) shifted once (1, .9, .75, .5, 0 at shift 3). ``diffusers`` is
            FlowMatchEulerDiscreteScheduler.set_timesteps, which shifts its end point twice (1, .858, .602,
            .009, 0): the grid of the published student.
        terminal: last level above 0, to which the distances from 1 are stretched (diffusers' shift_terminal).
    """
    smallest = 1 / num_steps
    if grid == "diffusers":
        smallest = shift_sigma(torch.tensor(1 / NUM_TRAIN_TIMESTEPS, dtype=torch.float64), shift).item()
    elif grid != "shifted":
        raise ValueError(f"grid is {grid!r}: choose diffusers or shifted, or give the levels")
    sigmas = shift_sigma(torch.linspace(1, smallest, num_steps, dtype=torch.float64), shift)
    if terminal and num_steps > 1:  # one step starts at 1, where there is nothing to stretch
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)]).float()


def flow_schedule(sigmas: Tensor | Sequence[float]) -> NoiseLevel:
    """A schedule from falling sigmas, first at most 1, last 0.

    Raises:
        ValueError: if the sigmas do not fall from at most 1 to exactly 0.
    """
    sigmas = torch.as_tensor(sigmas, dtype=torch.float32)
    if len(sigmas) < 2 or sigmas[0] > 1 or sigmas[-1] != 0 or not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas {[round(s, 4) for s in sigmas.tolist()]} must fall strictly from at most 1 to 0")
    return flow_level(sigmas)


def flow_student_schedule(
    grid: str | Sequence[float], num_steps: int, shift: float, terminal: float | None = None
) -> NoiseLevel:
    """A student's flow schedule, [num_steps + 1], last clean.

    Args:
        grid: a name of `flow_sigmas`, or num_steps sigmas above 0, which are not shifted.
        shift, terminal: of the family's schedules, as in `flow_sigmas`.

    Raises:
        ValueError: if the grid has an unknown name, another number of levels, or does not fall from at most 1.
    """
    if isinstance(grid, str):
        return flow_schedule(flow_sigmas(num_steps, shift, grid, terminal))
    if len(grid) != num_steps:
        raise ValueError(f"grid has {len(grid)} levels, num_steps={num_steps} needs as many")
    return flow_schedule([*grid, 0.0])


def random_flow_level(uniform: Tensor, level_range: tuple[float, float], shift: float) -> NoiseLevel:
    """A flow level per sample, [B, 1, 1, 1], from uniform numbers [B]; `level_range` are sigmas before the shift."""
    low, high = level_range
    return flow_level(shift_sigma(low + (high - low) * uniform, shift).view(-1, 1, 1, 1))


def vp_schedule(num_steps: int, alphas_cumprod: Tensor) -> NoiseLevel:
    """Trailing schedule of a diffusion model, [num_steps + 1]: starts at the last timestep, ends clean.

    Only trailing spacing (arXiv:2305.08891) has its first step at full noise: 999, 749, 499, 249 for 4 steps of 1000.
    """
    total = len(alphas_cumprod)
    timesteps = (torch.arange(num_steps, 0, -1, dtype=torch.float64) * total / num_steps).round().long() - 1
    return _to_the_clean_end(timesteps, alphas_cumprod)


def vp_schedule_at(timesteps: Sequence[float], alphas_cumprod: Tensor) -> NoiseLevel:
    """A diffusion schedule at given timesteps, and the clean end, [len(timesteps) + 1].

    Raises:
        ValueError: if they are not whole numbers that fall within the table.
    """
    falling = all(before > after for before, after in zip(timesteps, timesteps[1:], strict=False))
    last = len(alphas_cumprod) - 1
    if not falling or any(t != int(t) or not 0 <= t <= last for t in timesteps):
        raise ValueError(f"timesteps {list(timesteps)} must be whole numbers that fall strictly from at most {last}")
    return _to_the_clean_end(torch.tensor([int(t) for t in timesteps]), alphas_cumprod)


def _to_the_clean_end(timesteps: Tensor, alphas_cumprod: Tensor) -> NoiseLevel:
    """The levels of integer timesteps [N], and after them the clean one, in float32."""
    levels = vp_level(timesteps, alphas_cumprod)
    return NoiseLevel(
        torch.cat([levels.alpha, levels.alpha.new_ones(1)]).float(),
        torch.cat([levels.sigma, levels.sigma.new_zeros(1)]).float(),
        torch.cat([timesteps, timesteps.new_zeros(1)]),
    )


def add_noise(x0: Tensor, noise: Tensor, level: NoiseLevel) -> Tensor:
    """Latents at a level: alpha x0 + sigma noise, [B, C, H, W]."""
    return level.alpha * x0 + level.sigma * noise


def step(latents: Tensor, denoised: Tensor, level: NoiseLevel, following: NoiseLevel) -> Tensor:
    """One deterministic sampler step: keep the noise that `denoised` implies, move to the next level.

    Euler for flow matching, DDIM with eta 0 for diffusion models.

    `denoised` is x0 predicted from the latents at `level`, which must not be clean.
    """
    noise = (latents - level.alpha * denoised) / level.sigma
    return add_noise(denoised, noise, following)


def x0_from_velocity(latents: Tensor, velocity: Tensor, level: NoiseLevel) -> Tensor:
    """x0 from a flow network's output, velocity = noise - x0."""
    return latents - level.sigma * velocity


def x0_from_eps(latents: Tensor, eps: Tensor, level: NoiseLevel) -> Tensor:
    """x0 from a diffusion network that predicts the noise."""
    return (latents - level.sigma * eps) / level.alpha


def x0_from_v_prediction(latents: Tensor, v_prediction: Tensor, level: NoiseLevel) -> Tensor:
    """x0 from a diffusion network that predicts alpha noise - sigma x0 (arXiv:2202.00512)."""
    return level.alpha * latents - level.sigma * v_prediction
