"""FLUX.2 Klein (flow matching): the only code that knows the output and the call of Klein's network.

Double and single streams of picture and prompt tokens, with layers of a language model as embeddings. The autoencoder's
latents are packed into tokens of 2 x 2 and normalised before the network sees them, so a latent here is a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import FlowBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, count_chat_tokens
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS, NoiseLevel, x0_from_velocity

MOST_TOKENS = 512  # of a prompt with its chat template, in the pipeline
_LAYERS = 3  # of the language model, side by side
_TEACHER_STEPS = 50  # of FLUX.2-klein-base; the shift depends on the number of steps


class Flux2Klein(FlowBackbone):
    """Backbone over a Flux2KleinPipeline directory."""

    pipeline_class = Flux2KleinPipeline
    component = "transformer"
    network_class = Flux2Transformer2DModel
    autoencoder_class = AutoencoderKLFlux2
    grid = "shifted"  # the pipeline gives its scheduler even sigmas from 1 to 1 / N, which are shifted once

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._check_sequence_length(MOST_TOKENS)
        self._check_text_width(self._config["joint_attention_dim"] // _LAYERS)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        # the language model's output for padding is part of the prompt: the network has no mask
        tokens = self.max_sequence_length
        embeds, _ = self._text.encode_prompt(prompts, device=self.device, max_sequence_length=tokens)
        return {"prompt_embeds": embeds}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"prompt_embeds": (self.max_sequence_length, self._config["joint_attention_dim"])}

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        embeds, (height, width) = cond["prompt_embeds"].to(self.dtype), latents.shape[-2:]
        tokens = model(
            hidden_states=latents.to(self.dtype).flatten(2).mT,
            encoder_hidden_states=embeds,
            timestep=level.timestep.flatten().expand(len(latents)) / NUM_TRAIN_TIMESTEPS,
            img_ids=self._positions(1, height, width, 1),
            txt_ids=self._positions(1, 1, 1, embeds.shape[1]),
        ).sample
        velocity = tokens.mT.unflatten(2, (height, width))
        return x0_from_velocity(latents, velocity.float(), level)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        norm = self._vae.bn
        mean, variance = (value.view(1, -1, 1, 1) for value in (norm.running_mean, norm.running_var))
        raw = latents * (variance + self._vae.config.batch_norm_eps).sqrt() + mean
        raw = Flux2KleinPipeline._unpatchify_latents(raw)
        return (self._vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    def distilled(self) -> str | None:
        if self.pipeline_class.load_config(self.folder).get("is_distilled"):
            return "model_index.json has is_distilled: give a base model such as black-forest-labs/FLUX.2-klein-base-4B"
        if self._config["guidance_embeds"]:
            return "the transformer has guidance_embeds, as FLUX.2-dev: its guidance is distilled"
        return None

    def _positions(self, *sizes: int) -> Tensor:
        """Positions of tokens along time, height, width and prompt, [tokens, 4]."""
        return torch.cartesian_prod(*(torch.arange(size, device=self.device) for size in sizes))

    def _latent_sizes(self, vae: Mapping[str, Any]) -> tuple[int, int, int]:
        patch = vae["patch_size"][0]
        return self._config["in_channels"], patch * 2 ** (len(vae["block_out_channels"]) - 1), 1

    def _shift(self, num_steps: int | None = None) -> float:
        if not self._scheduler.get("use_dynamic_shifting"):
            return super()._shift(num_steps)
        return self._dynamic_shift(compute_empirical_mu(math.prod(self.latent_shape[1:]), num_steps or _TEACHER_STEPS))

    @cached_property
    def _text(self) -> Flux2KleinPipeline:
        return self._load_text(transformer=None)


def token_limits(_folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """The prompt and the chat template around it have `max_sequence_length` tokens together."""
    return {"tokenizer": TokenLimit(max_sequence_length, partial(count_chat_tokens, enable_thinking=False))}


load = Flux2Klein  # called by `load_backbone`
