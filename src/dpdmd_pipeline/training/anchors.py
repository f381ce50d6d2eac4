"""Anchors for the student updates, read from a cache or computed online by the same function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, GuidanceBatch, guided
from dpdmd_pipeline.dpdmd.anchor import teacher_anchors
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, sample_seeds


class Embeddings(Protocol):
    """Text embeddings by row; the last row is the empty prompt."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Conditioning: ...


class AnchorBatch(NamedTuple):
    """Samples of a student update.

    Attributes:
        prompts: B rows of the embeddings.
        noise: [B, C, H, W].
        anchors: teacher latents per anchored step, each [B, C, H, W].
        denoised: the teacher's x0 at each anchor, for the tangent target; empty for the secant.
    """

    prompts: list[int]
    noise: Tensor
    anchors: list[Tensor]
    denoised: list[Tensor]


class AnchorCache(Protocol):
    """Rows of prompt, seed, anchor_0, anchor_1 ..., and denoised_0 ... for the tangent target."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]: ...


class TeacherAnchors:
    """The guided teacher's latents after some of its sampling steps.

    Args:
        backbone, teacher: family and network.
        embeddings: of all prompts, the empty one last.
        num_steps, guidance_scale: of the teacher.
        anchor_steps: rising numbers of teacher steps.
        with_denoised: True to compute the tangent target, too: one more guided call per anchor.
        guidance_batch: see `guided`; changes rounding only.
    """

    def __init__(
        self,
        backbone: Backbone,
        teacher: nn.Module,
        embeddings: Embeddings,
        *,
        num_steps: int,
        guidance_scale: float,
        anchor_steps: Sequence[int],
        with_denoised: bool,
        guidance_batch: GuidanceBatch = "joint",
    ) -> None:
        self.backbone, self.teacher, self.embeddings = backbone, teacher.requires_grad_(False).eval(), embeddings
        self.guidance_scale, self.anchor_steps, self.with_denoised = guidance_scale, list(anchor_steps), with_denoised
        self.guidance_batch = guidance_batch
        self.levels = backbone.schedule(num_steps)
        self.uncond = embeddings.rows([len(embeddings) - 1])

    @property
    def anchor_levels(self) -> list[NoiseLevel]:
        """Scalar level of each anchor."""
        return [self.levels[steps] for steps in self.anchor_steps]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Anchors of B samples.

        Args:
            prompts: rows of the embeddings.
            seeds: of the noise, one per sample.

        Returns:
            anchor_0 ..., and denoised_0 ... with `with_denoised`; each [B, C, H, W] in float32 on the CPU.
        """
        device = self.levels.sigma.device
        cond = {name: value.to(device) for name, value in self.embeddings.rows(prompts).items()}
        uncond = {name: value.to(device) for name, value in self.uncond.items()}
        teacher = guided(self.backbone, self.teacher, cond, uncond, self.guidance_scale, batch=self.guidance_batch)
        noise = noise_from_seeds(seeds, self.backbone.latent_shape).to(device)
        anchors = teacher_anchors(teacher, noise, self.levels, self.anchor_steps)
        tensors = {f"anchor_{index}": anchor for index, anchor in enumerate(anchors)}
        if self.with_denoised:
            pairs = zip(anchors, self.anchor_levels, strict=True)
            tensors |= {f"denoised_{index}": teacher(anchor, level) for index, (anchor, level) in enumerate(pairs)}
        return {name: value.cpu() for name, value in tensors.items()}


def _batch(prompts: Sequence[int], noise: Tensor, tensors: dict[str, Tensor], anchored_steps: int) -> AnchorBatch:
    """A batch with the first `anchored_steps` anchors, in float32."""
    numbers = range(anchored_steps)
    return AnchorBatch(
        list(prompts),
        noise,
        [tensors[f"anchor_{number}"].float() for number in numbers],
        [tensors[f"denoised_{number}"].float() for number in numbers if f"denoised_{number}" in tensors],
    )


class CachedAnchors:
    """Samples from a cache, drawn without replacement in each epoch.

    Args:
        cache: written by the anchors stage.
        latent_shape: (C, H, W) of the noise.
        seed, batch_size, anchored_steps: of the recipe; the batch is the global one.
    """

    def __init__(
        self, cache: AnchorCache, latent_shape: Sequence[int], *, seed: int, batch_size: int, anchored_steps: int
    ) -> None:
        self.cache, self.latent_shape = cache, latent_shape
        self.seed, self.batch_size, self.anchored_steps = seed, batch_size, anchored_steps
        self._epoch, self._permutation = -1, list[int]()  # the epoch used last; none yet

    def __call__(self, cycle: int, batch_indices: Sequence[int]) -> AnchorBatch:
        """Samples at some indices of a cycle's global batch."""
        tensors = self.cache.rows([self._row(cycle * self.batch_size + index) for index in batch_indices])
        noise = noise_from_seeds(tensors["seed"], self.latent_shape)
        return _batch(tensors["prompt"].tolist(), noise, tensors, self.anchored_steps)

    def _row(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.cache))
        return self._order(epoch)[offset]

    def _order(self, epoch: int) -> list[int]:
        """Permutation of the cache's rows in an epoch."""
        if epoch != self._epoch:
            (seed,) = sample_seeds(self.seed, "student/order", epoch, 1)
            generator = torch.Generator().manual_seed(seed)
            self._epoch, self._permutation = epoch, torch.randperm(len(self.cache), generator=generator).tolist()
        return self._permutation


class OnlineAnchors:
    """Samples with fresh prompts and seeds, whose anchors the teacher computes at once, as in the published code.

    Args:
        teacher: computes the anchors; its noise and levels are those of a cache.
        prompts: rows of the training prompts.
        seed, anchored_steps: of the recipe.
    """

    def __init__(self, teacher: TeacherAnchors, prompts: Sequence[int], *, seed: int, anchored_steps: int) -> None:
        self.teacher, self.prompts = teacher, prompts
        self.seed, self.anchored_steps = seed, anchored_steps

    def __call__(self, cycle: int, batch_indices: Sequence[int]) -> AnchorBatch:
        """Samples at some indices of a cycle's global batch."""
        prompt_seeds = sample_seeds(self.seed, "student/prompt", cycle, batch_indices)
        prompts = [self.prompts[seed % len(self.prompts)] for seed in prompt_seeds]
        seeds = sample_seeds(self.seed, "student/noise", cycle, batch_indices)
        noise = noise_from_seeds(seeds, self.teacher.backbone.latent_shape)
        tensors = self.teacher(prompts, seeds) if self.anchored_steps else {}
        return _batch(prompts, noise, tensors, self.anchored_steps)
