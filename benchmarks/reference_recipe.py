"""The published training loop of DP-DMD, written from its paper and the public facts about its code.

It is the baseline of our benchmarks, and is never made faster on purpose. The text encoders stay loaded and run three
times in every update. Every update sets up its sampler again and fetches its losses. The student's update computes the
anchors. A whole batch has one noise level, and both losses share one backward pass. Pictures are decoded and written
during training. Nothing is cached. The package does not import it.

It trains SD3 with velocities throughout, on diffusers' own sampler (arXiv:2602.03139, algorithm 1). So it also is an
oracle for our loop, which works in x0: tests/benchmarks/test_reference_recipe.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler as Sampler
from PIL import Image
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Conditioning
from dpdmd_pipeline.backbones.sd3 import SD3


@dataclass(frozen=True)
class PublishedSettings:
    """Numbers of the published loop.

    Attributes:
        anchor_steps: teacher steps K of the anchor.
        pictures_every: student updates between pictures; 1 writes them in every update, 0 never.
        pictures: folder for the pictures.
    """

    prompts: Sequence[str]
    batch_size: int
    num_steps: int
    teacher_steps: int
    anchor_steps: int
    guidance_scale: float
    diversity_weight: float
    fake_score_updates: int
    learning_rate: float
    max_grad_norm: float
    pictures_every: int
    pictures: Path


@dataclass(frozen=True)
class Draw:
    """The random inputs of one update.

    Attributes:
        prompts: B.
        noise, renoise: the student's start noise, and the noise added to its pictures, [B, C, H, W].
        sigma: level of the re-noised pictures, [1, 1, 1, 1] or per sample, [B, 1, 1, 1].
    """

    prompts: list[str]
    noise: Tensor
    renoise: Tensor
    sigma: Tensor


class PublishedLoop:
    """Three networks, two optimizers, text encoders and autoencoder, all in memory.

    Args:
        family: runs text encoders and autoencoder; its dtype is the networks' precision.
        teacher, student, fake_score: networks; the last two are trained in place.
    """

    def __init__(
        self, family: SD3, teacher: nn.Module, student: nn.Module, fake_score: nn.Module, settings: PublishedSettings
    ) -> None:
        self.family, self.settings, self.device = family, settings, family.device
        self.teacher, self.student, self.fake_score = teacher, student, fake_score
        self.student_optimizer = torch.optim.AdamW(_trainable(student), settings.learning_rate, weight_decay=0.0)
        self.fake_score_optimizer = torch.optim.AdamW(_trainable(fake_score), settings.learning_rate, weight_decay=0.0)
        self.student_updates = 0

    def cycle(self) -> dict[str, float]:
        """Run the updates of the fake score, then one of the student; returns the losses."""
        losses = [self.update_fake_score(self.draw()) for _ in range(self.settings.fake_score_updates)]
        return {"fake_score_loss": sum(losses) / len(losses), **self.update_student(self.draw())}

    def draw(self) -> Draw:
        """Draw from the global generator; the whole batch has one noise level."""
        batch, prompts = self.settings.batch_size, self.settings.prompts
        batch_prompts = [prompts[i] for i in torch.randint(len(prompts), (batch,)).tolist()]
        noise, renoise = (torch.randn(batch, *self.family.latent_shape, device=self.device) for _ in range(2))
        sigmas = self._sampler().sigmas  # all levels of the teacher's training
        return Draw(
            batch_prompts, noise, renoise, sigmas[torch.randint(len(sigmas), (1,))].to(self.device).view(1, 1, 1, 1)
        )

    def update_fake_score(self, draw: Draw) -> float:
        """Train the fake score on the velocity of the student's pictures; returns the loss."""
        cond, _, _ = self._encode(draw.prompts)
        sampler = self._sampler(self.settings.num_steps)
        with torch.no_grad():
            x0 = self._rollout(sampler, self.student, draw.noise, cond, 0)
        noisy = (1 - draw.sigma) * x0 + draw.sigma * draw.renoise
        loss = F.mse_loss(self._velocity(self.fake_score, noisy, draw.sigma, cond), draw.renoise - x0)
        self._update(loss, self.fake_score, self.fake_score_optimizer)
        return loss.item()

    def update_student(self, draw: Draw) -> dict[str, float]:
        """Algorithm 1: train the first step on the teacher's anchor, the others by distribution matching."""
        cond, teacher_cond, uncond = self._encode(draw.prompts)
        target = self._anchor_velocity(draw.noise, teacher_cond, uncond)
        sampler = self._sampler(self.settings.num_steps)
        velocity = self._velocity(self.student, draw.noise, sampler.sigmas[0], cond)
        diversity = F.mse_loss(velocity, target)
        latents = sampler.step(velocity, sampler.timesteps[0], draw.noise).prev_sample.detach()
        x0 = self._rollout(sampler, self.student, latents, cond, 1)
        dmd = self._matching_loss(x0, draw, cond, teacher_cond, uncond)
        loss = dmd + self.settings.diversity_weight * diversity
        self._update(loss, self.student, self.student_optimizer)
        self._write_pictures(x0.detach())
        return {"dmd_loss": dmd.item(), "diversity_loss": diversity.item()}

    @torch.no_grad()
    def _anchor_velocity(self, noise: Tensor, cond: Conditioning, uncond: Conditioning) -> Tensor:
        """eq. 6: (noise - anchor) / (1 - sigma_K); the anchor is the guided teacher's latents after K steps."""
        sampler, latents = self._sampler(self.settings.teacher_steps), noise
        for number in range(self.settings.anchor_steps):
            velocity = self._guided(latents, sampler.sigmas[number], cond, uncond)
            latents = sampler.step(velocity, sampler.timesteps[number], latents).prev_sample
        return (noise - latents) / (1 - sampler.sigmas[self.settings.anchor_steps])

    def _matching_loss(
        self, x0: Tensor, draw: Draw, cond: Conditioning, teacher_cond: Conditioning, uncond: Conditioning
    ) -> Tensor:
        """L_DMD with the gradient (fake - real) / mean|noisy - real|."""
        noisy = (1 - draw.sigma) * x0 + draw.sigma * draw.renoise
        with torch.no_grad():
            real = noisy - draw.sigma * self._guided(noisy, draw.sigma, teacher_cond, uncond)
            fake = noisy - draw.sigma * self._velocity(self.fake_score, noisy, draw.sigma, cond)
            gradient = (fake - real) / (noisy - real).abs().mean(dim=(1, 2, 3), keepdim=True)
        return 0.5 * F.mse_loss(x0, (x0 - gradient).detach())

    def _rollout(self, sampler: Sampler, network: nn.Module, latents: Tensor, cond: Conditioning, start: int) -> Tensor:
        """Take the sampler's steps from number `start` on."""
        for sigma, timestep in zip(sampler.sigmas[start:-1], sampler.timesteps[start:], strict=True):
            velocity = self._velocity(network, latents, sigma, cond)
            latents = sampler.step(velocity, timestep, latents).prev_sample
        return latents

    def _sampler(self, num_steps: int | None = None) -> Sampler:
        sampler = Sampler.from_pretrained(self.family.folder, subfolder="scheduler")
        if num_steps is not None:
            sampler.set_timesteps(num_steps, device=self.device)
        return sampler

    def _encode(self, prompts: list[str]) -> tuple[Conditioning, Conditioning, Conditioning]:
        """Conditionings of student and fake score, of the teacher, and of its unconditional half."""
        return tuple(self.family.encode(texts) for texts in (prompts, prompts, [""] * len(prompts)))

    def _velocity(self, network: nn.Module, latents: Tensor, sigma: Tensor, cond: Conditioning) -> Tensor:
        dtype = self.family.dtype
        with torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            velocity = network(
                hidden_states=latents.to(dtype),
                timestep=(1000 * sigma).flatten().expand(len(latents)),
                encoder_hidden_states=cond["prompt_embeds"].to(dtype),
                pooled_projections=cond["pooled_embeds"].to(dtype),
            ).sample
        return velocity.float()

    def _guided(self, latents: Tensor, sigma: Tensor, cond: Conditioning, uncond: Conditioning) -> Tensor:
        """The teacher's velocity with classifier-free guidance, both halves in one batch."""
        both = {name: torch.cat([cond[name], uncond[name]]) for name in cond}
        twice = torch.cat([sigma.expand(len(latents), 1, 1, 1)] * 2)
        with_prompt, without = self._velocity(self.teacher, torch.cat([latents] * 2), twice, both).chunk(2)
        return without + self.settings.guidance_scale * (with_prompt - without)

    def _update(self, loss: Tensor, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(_trainable(network), self.settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    def _write_pictures(self, x0: Tensor) -> None:
        self.student_updates += 1
        every = self.settings.pictures_every
        if not every or self.student_updates % every:
            return
        pictures = (255 * self.family.decode(x0)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for number, picture in enumerate(pictures):
            Image.fromarray(picture).save(self.settings.pictures / f"{self.student_updates:06d}_{number}.png")


def _trainable(network: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in network.parameters() if parameter.requires_grad]
