"""An exact teacher: Gaussian data have a closed-form denoiser, ODE and anchor."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.noise import NoiseLevel, flow_level


@dataclass(frozen=True)
class Gaussian:
    """x0 ~ N(mean, std^2), element by element; valid for every path alpha x0 + sigma noise.

    Attributes:
        mean, std: of the data, [C, H, W].
    """

    mean: Tensor
    std: Tensor

    def spread(self, level: NoiseLevel) -> Tensor:
        """Standard deviation of the latents at a level."""
        return ((level.alpha * self.std).square() + level.sigma**2).sqrt()

    def score(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Gradient of the log density of the latents."""
        return -(latents - level.alpha * self.mean) / self.spread(level).square()

    def denoise(self, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Posterior mean of x0, by regression of x0 on the latents."""
        gain = level.alpha * self.std.square() / self.spread(level).square()
        return self.mean + gain * (latents - level.alpha * self.mean)

    def solve(self, latents: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """The probability-flow ODE from `start` to `end`: it keeps every sample's quantile."""
        quantile = (latents - start.alpha * self.mean) / self.spread(start)
        return end.alpha * self.mean + self.spread(end) * quantile

    def one_step(self, latents: Tensor, start: NoiseLevel, end: NoiseLevel) -> Tensor:
        """The perfect student: the x0 from which one sampler step gives `solve`.

        Written in quantiles u: for x0 = mean + g u the step lands at spread alpha_e g + sigma_e noise(g).
        """
        ratio = end.sigma / start.sigma
        gain = (self.spread(end) - ratio * self.spread(start)) / (end.alpha - ratio * start.alpha)
        return self.mean + gain * (latents - start.alpha * self.mean) / self.spread(start)


def make_gaussian(shape: tuple[int, int, int], seed: int = 0) -> Gaussian:
    """Means of order 1, standard deviations between 0.3 and 1.3; float64."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    return Gaussian(mean, 0.3 + torch.rand(shape, generator=generator, dtype=torch.float64))


def sdxl_table(total: int = 1000) -> Tensor:
    """SDXL's alphas_cumprod, [total] in float64; a finer table than 1000 follows the same curve."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, total, dtype=torch.float64).square() * (1000 / total)
    return (1 - betas).cumprod(0)


def flow_levels(num_steps: int) -> NoiseLevel:
    """A uniform flow schedule in float64, [num_steps + 1]."""
    return flow_level(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64))


def vp_levels(num_steps: int, total: int = 1000) -> NoiseLevel:
    """SDXL's trailing schedule in float64, [num_steps + 1]; `num_steps` must divide `total`."""
    timestep = torch.arange(total, 0, -total // num_steps) - 1
    alpha_bar = torch.cat([sdxl_table(total)[timestep], torch.ones(1, dtype=torch.float64)])
    return NoiseLevel(alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), torch.cat([timestep, torch.zeros(1).long()]))


PATHS = {"flow": flow_levels, "vp": vp_levels}
