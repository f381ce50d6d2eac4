"""Anchors for the student updates, read from a cache or computed online by the same function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import lru_cache
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, GuidanceBatch, guided
from dpdmd_pipeline.backbones.sizes import PictureSize
from dpdmd_pipeline.dpdmd.anchor import teacher_anchors
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, sample_seeds


class Rows(Protocol):
    """A table of tensors: text embeddings, or anchors with their prompts and seeds."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]: ...


class AnchorBatch(NamedTuple):
    """Samples of a student update."""

    prompts: list[int]  # B rows of the embeddings
    noise: Tensor  # [B, C, H, W]
    anchors: list[Tensor]  # teacher latents per anchored step, each [B, C, H, W]
    denoised: list[Tensor]  # the teacher's x0 at each anchor, for the tangent target; empty for the secant


@dataclass
class TeacherAnchors:
    """The guided teacher's latents after some of its sampling steps."""

    backbone: Backbone
    teacher: nn.Module
    embeddings: Rows  # of all prompts, the empty one last
    _: KW_ONLY
    num_steps: int
    guidance_scale: float
    anchor_steps: Sequence[int]  # rising numbers of teacher steps
    with_denoised: bool  # also compute the tangent target: one more guided call per anchor
    guidance_batch: GuidanceBatch = "joint"

    def __post_init__(self) -> None:
        self.teacher.requires_grad_(False).eval()
        self.levels = self.backbone.schedule(self.num_steps)
        self.uncond = self._cond([len(self.embeddings) - 1])

    def at(self, size: PictureSize) -> TeacherAnchors:
        """The same teacher for pictures of another size."""
        return replace(self, backbone=self.backbone.at(size))

    @property
    def anchor_levels(self) -> list[NoiseLevel]:
        """Scalar level of each anchor."""
        return [self.levels[steps] for steps in self.anchor_steps]

    @torch.no_grad()
    def __call__(self, prompts: Sequence[int], seeds: Sequence[int]) -> dict[str, Tensor]:
        """Anchors of B samples, by rows of the embeddings and seeds of the noise.

        Returns:
            anchor_0 ..., and denoised_0 ... with `with_denoised`; each [B, C, H, W] in float32.
        """
        cond, uncond = self._cond(prompts), self.uncond
        teacher = guided(self.backbone, self.teacher, cond, uncond, self.guidance_scale, batch=self.guidance_batch)
        noise = noise_from_seeds(seeds, self.backbone.latent_shape).to(self.backbone.device, non_blocking=True)
        anchors = teacher_anchors(teacher, noise, self.levels, self.anchor_steps)
        tensors = {f"anchor_{index}": anchor for index, anchor in enumerate(anchors)}
        if self.with_denoised:
            pairs = zip(anchors, self.anchor_levels, strict=True)
            tensors |= {f"denoised_{index}": teacher(anchor, level) for index, (anchor, level) in enumerate(pairs)}
        return tensors

    def _cond(self, prompts: Sequence[int]) -> Conditioning:
        """Embeddings on the backbone's device."""
        rows = self.embeddings.rows(prompts)
        return {name: value.to(self.backbone.device, non_blocking=True) for name, value in rows.items()}


def _batch(prompts: Sequence[int], noise: Tensor, tensors: dict[str, Tensor], anchored_steps: int) -> AnchorBatch:
    """A batch with the first `anchored_steps` anchors, in float32."""
    numbers = range(anchored_steps)
    return AnchorBatch(
        list(prompts),
        noise,
        [tensors[f"anchor_{number}"].float() for number in numbers],
        [tensors[f"denoised_{number}"].float() for number in numbers if f"denoised_{number}" in tensors],
    )


@dataclass
class CachedAnchors:
    """Samples from a cache, drawn without replacement in each epoch."""

    cache: Rows  # of prompt, seed, anchor_0 ..., and denoised_0 ... for the tangent target
    latent_shape: Sequence[int]  # (C, H, W) of the noise
    _: KW_ONLY
    seed: int
    batch_size: int  # over all processes
    anchored_steps: int
    part: range | None = None  # rows of this picture size; None: all
    sizes: int = 1  # picture sizes, each of which has every so many cycles

    def __call__(self, cycle: int, batch_indices: Sequence[int]) -> AnchorBatch:
        """Samples at some indices of a cycle's global batch."""
        part = range(len(self.cache)) if self.part is None else self.part
        first = cycle // self.sizes * self.batch_size
        positions = (divmod(first + index, len(part)) for index in batch_indices)
        tensors = self.cache.rows([part[_order(self.seed, epoch, len(part))[offset]] for epoch, offset in positions])
        noise = noise_from_seeds(tensors["seed"], self.latent_shape)
        return _batch(tensors["prompt"].tolist(), noise, tensors, self.anchored_steps)


@lru_cache(maxsize=2)  # parts of two lengths take turns
def _order(run_seed: int, epoch: int, rows: int) -> list[int]:
    """Permutation of a cache's rows in an epoch."""
    (seed,) = sample_seeds(run_seed, "student/order", epoch, 1)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class OnlineAnchors:
    """Samples with fresh prompts and seeds, whose anchors the teacher computes at once, as in the published code."""

    teacher: TeacherAnchors
    prompts: Sequence[int]  # training prompts, as rows of the embeddings
    _: KW_ONLY
    seed: int
    anchored_steps: int

    def __call__(self, cycle: int, batch_indices: Sequence[int]) -> AnchorBatch:
        """Samples at some indices of a cycle's global batch."""
        prompt_seeds = sample_seeds(self.seed, "student/prompt", cycle, batch_indices)
        prompts = [self.prompts[seed % len(self.prompts)] for seed in prompt_seeds]
        seeds = sample_seeds(self.seed, "student/noise", cycle, batch_indices)
        noise = noise_from_seeds(seeds, self.teacher.backbone.latent_shape)
        tensors = self.teacher(prompts, seeds) if self.anchored_steps else {}
        return _batch(prompts, noise, tensors, self.anchored_steps)
