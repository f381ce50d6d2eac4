"""What the method needs of a model family, and how a family is loaded."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, noise_share
from dpdmd_pipeline.dpdmd.sampling import Denoise

Conditioning = dict[str, Tensor]  # batch-first; fits a safetensors shard as it is

GuidanceBatch = Literal["joint", "apart"]
EVERY_LEVEL = (0.0, 1.0)  # as a guidance interval


class Backbone(Protocol):
    """A family of text-to-image models, seen as denoisers that return x0.

    The network is an argument, since teacher, student and fake score are three networks of one family.
    """

    folder: Path  # the teacher's
    latent_shape: tuple[int, int, int]  # (C, H, W)
    device: torch.device  # where networks are loaded
    dtype: torch.dtype  # of the networks, and of the embeddings
    prediction: str  # what the network returns: flow (velocity), eps or v (v-prediction)

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        """The denoising network, of the teacher or, with a folder, of a saved student.

        Its weights have the configured precision, or float32, which training needs.
        """

    def schedule(self, num_steps: int) -> NoiseLevel:
        """The teacher's own sampling schedule, [num_steps + 1]: noisiest first, clean last."""

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        """A student's schedule, on a named grid or on explicit levels: sigmas of flow, timesteps of diffusion."""

    def random_level(self, uniform: Tensor) -> NoiseLevel:
        """Per-sample levels [B, 1, 1, 1] for DMD and the fake score, from uniform numbers [B] in [0, 1)."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings of prompts; of [""] for the unconditional branch."""

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, as `encode` names them, without the batch; reads configs only."""

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        """x0 in float32, [B, C, H, W]."""

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance as this family's pipeline does it."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], [B, 3, H, W]."""


def load_backbone(family: str, folder: Path, **options: Any) -> Backbone:
    """The adapter of a family over a teacher's folder; weights are read on use.

    Args:
        family: name of a file in `backbones/`.
        folder: diffusers pipeline directory of the teacher.
        options: of that family.

    Raises:
        ValueError: if the family is unknown.
    """
    module = _module(family)
    _no_loading_bars()
    return module.load(folder, **options)


def _module(family: str) -> Any:
    if family not in FAMILIES:
        raise ValueError(f"backbone.family is {family!r}: choose one of {', '.join(FAMILIES)}")
    return importlib.import_module(f"dpdmd_pipeline.backbones.{family}")


def _no_loading_bars() -> None:
    """Weights of diffusers and transformers load in many parts, each with a bar of its own."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


# ---- prompts that are too long


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens of each prompt, special ones included."""
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]


@dataclass(frozen=True)
class TokenLimit:
    """Where a tokenizer cuts prompts off.

    Attributes:
        tokens: how many of a prompt are kept.
        count: (tokenizer, prompts) -> tokens of each, as this limit counts them; may import the family's pipeline.
    """

    tokens: int
    count: Callable[[Any, Sequence[str]], list[int]] = count_tokens


def token_limits(family: str, folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """Limits of a teacher's tokenizers, by the names of their folders; reads their configs only.

    Args:
        family: name of a file in `backbones/`.
        folder: of the teacher.
        max_sequence_length: of the family's options.

    Raises:
        ValueError: if the family is unknown.
    """
    return _module(family).token_limits(folder, max_sequence_length)


def tokenizer_names(folder: Path) -> list[str]:
    """Folders of a teacher's tokenizers, without those whose text encoder is not there."""
    names = sorted(path.parent.name for path in folder.glob("tokenizer*/tokenizer_config.json"))
    return [name for name in names if (folder / name.replace("tokenizer", "text_encoder")).is_dir()]


def tokenizer_length(tokenizer: Path) -> int:
    """The most tokens that go into the text encoder, by the config in a tokenizer's folder; special ones included."""
    return int(json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))["model_max_length"])


# ---- guidance


def conditioned(backbone: Backbone, model: nn.Module, cond: Conditioning) -> Denoise:
    """The network under fixed prompts, as a denoiser."""
    return lambda latents, level: backbone.denoise(model, latents, level, cond)


def guided(
    backbone: Backbone,
    model: nn.Module,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    *,
    interval: tuple[float, float] = EVERY_LEVEL,
    batch: GuidanceBatch = "joint",
) -> Denoise:
    """The network under fixed prompts with classifier-free guidance, as a denoiser.

    At scale 1 the unconditional half is not computed.

    Args:
        cond: batch of B.
        uncond: batch of 1, expanded to B.
        scale: in the sense of the family's own pipeline.
        interval: a sample is guided where its `noise_share` lies within, ends included; elsewhere it gets the
            conditional answer (arXiv:2404.07724). Both halves are computed at every level.
        batch: whether both halves go through the network in one batch of 2 B, or apart in two of B, which takes less
            memory. The same but for rounding.
    """
    if scale == 1:
        return conditioned(backbone, model, cond)
    without = {name: uncond[name].expand_as(value) for name, value in cond.items()}
    ask = {"joint": _joint, "apart": _apart}[batch](backbone, model, cond, without)

    def denoise(latents: Tensor, level: NoiseLevel) -> Tensor:
        cond_x0, uncond_x0 = ask(latents, level)
        x0 = backbone.guide(cond_x0, uncond_x0, scale)
        if interval == EVERY_LEVEL:
            return x0
        share = noise_share(level)
        return torch.where((interval[0] <= share) & (share <= interval[1]), x0, cond_x0)

    return denoise


_Halves = Callable[[Tensor, NoiseLevel], tuple[Tensor, Tensor]]  # x0 with the prompts and without, each [B, C, H, W]


def _joint(backbone: Backbone, model: nn.Module, cond: Conditioning, without: Conditioning) -> _Halves:
    both = {name: torch.cat([value, without[name]]) for name, value in cond.items()}

    def ask(latents: Tensor, level: NoiseLevel) -> tuple[Tensor, Tensor]:
        per_sample = level.sigma.ndim > 0
        twice = (
            NoiseLevel(*(torch.cat([v, v]) for v in (level.alpha, level.sigma, level.timestep)))
            if per_sample
            else level
        )
        return backbone.denoise(model, torch.cat([latents, latents]), twice, both).chunk(2)

    return ask


def _apart(backbone: Backbone, model: nn.Module, cond: Conditioning, without: Conditioning) -> _Halves:
    return lambda latents, level: tuple(backbone.denoise(model, latents, level, half) for half in (cond, without))
