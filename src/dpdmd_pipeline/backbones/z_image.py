"""Z-Image (flow matching): the only code that knows the output and the call of Z-Image's network.

A single stream of picture and prompt tokens, with one language model as text encoder (arXiv:2511.22699). Its network
counts time from noise (0) to picture (1) and returns the velocity with the opposite sign.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import FlowBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, count_chat_tokens, padded, prompt_lengths
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS, NoiseLevel, x0_from_velocity

_TURBO_SHIFT = 3.0  # in the scheduler of Z-Image-Turbo; Z-Image has 6


class ZImage(FlowBackbone):
    """Backbone over a ZImagePipeline directory."""

    pipeline_class = ZImagePipeline
    component = "transformer"
    network_class = ZImageTransformer2DModel
    autoencoder_class = AutoencoderKL
    grid = "shifted"  # the pipeline gives its scheduler even sigmas from 1 to 1 / N, which are shifted once

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        if not self.max_sequence_length:
            raise ValueError("backbone.max_sequence_length is 0: Z-Image needs a positive one, its own default is 512")
        if self._config.get("siglip_feat_dim"):
            raise ValueError(f"{folder}: the transformer has siglip_feat_dim: give a text-to-image model")
        self._check_text_width(self._config["cap_feat_dim"])

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        tokens = self.max_sequence_length
        # a copy: the pipeline writes the chat template into the list
        embeds, _ = self._text.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=tokens
        )
        return padded(embeds, tokens)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {"prompt_embeds": (tokens, self._config["cap_feat_dim"]), "prompt_mask": (tokens,)}

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        embeds = cond["prompt_embeds"].to(self.dtype)
        outputs = model(
            list(latents.to(self.dtype).unsqueeze(2)),  # a video of one frame
            1 - level.timestep.flatten().expand(len(latents)) / NUM_TRAIN_TIMESTEPS,
            [prompt[:length] for prompt, length in zip(embeds, prompt_lengths(cond), strict=True)],
        ).sample
        velocity = -torch.stack(outputs).squeeze(2)
        return x0_from_velocity(latents, velocity.float(), level)

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        """Count from 0: the pipeline adds its scale times (cond - uncond) to cond, not to uncond."""
        return {"guidance_scale": scale - 1}

    def distilled(self) -> str | None:
        if self.shift != _TURBO_SHIFT:
            return None
        return f"the scheduler's shift is {self.shift:g}, that of Z-Image-Turbo: give Tongyi-MAI/Z-Image (shift 6)"

    def _latent_sizes(self, vae: Mapping[str, Any]) -> tuple[int, int, int]:
        channels, pixels, _ = super()._latent_sizes(vae)
        return channels, pixels, self._config["all_patch_size"][0]

    @cached_property
    def _text(self) -> ZImagePipeline:
        return self._load_text(transformer=None)


def token_limits(_folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """The prompt and the chat template around it have `max_sequence_length` tokens together."""
    return {"tokenizer": TokenLimit(max_sequence_length, partial(count_chat_tokens, enable_thinking=True))}


load = ZImage  # called by `load_backbone`
