"""SD3 and SD3.5 (flow matching): the only code that knows the output and the call of SD3's network.

The embedded shapes teacher is an SD3.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import FlowBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, tokenizer_length, tokenizer_names
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, x0_from_velocity


class SD3(FlowBackbone):
    """Backbone over a StableDiffusion3Pipeline directory."""

    pipeline_class = StableDiffusion3Pipeline
    component = "transformer"
    network_class = SD3Transformer2DModel
    autoencoder_class = AutoencoderKL

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self._text.encode_prompt(
            prompts,
            None,
            None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = tokenizer_length(self.folder / "tokenizer") + self.max_sequence_length  # of CLIP, then of T5
        return {
            "prompt_embeds": (tokens, self._config["joint_attention_dim"]),
            "pooled_embeds": (self._config["pooled_projection_dim"],),
        }

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        velocity = model(
            hidden_states=latents.to(self.dtype),
            timestep=level.timestep.flatten().expand(len(latents)),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            pooled_projections=cond["pooled_embeds"].to(self.dtype),
        ).sample
        return x0_from_velocity(latents, velocity.float(), level)

    def _largest_side(self) -> int:
        return self._config.get("pos_embed_max_size", 96) * self._patch * self._pixels

    @cached_property
    def _text(self) -> StableDiffusion3Pipeline:
        without_t5 = {} if (self.folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
        return self._load_text(transformer=self.empty_model(), **without_t5)  # `encode_prompt` reads its config


def token_limits(folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """T5's tokens are cut at `max_sequence_length`, both CLIPs' at the length of the first."""
    clip = TokenLimit(tokenizer_length(folder / "tokenizer"))
    t5 = TokenLimit(max_sequence_length)
    return {name: t5 if name == "tokenizer_3" else clip for name in tokenizer_names(folder)}


load = SD3  # called by `load_backbone`
