"""Qwen-Image (flow matching): the only code that knows the output and the call of Qwen-Image's network.

Picture tokens of 2 x 2 latent pixels beside prompt tokens, with a vision-language model as text encoder
(arXiv:2508.02324).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage import calculate_shift
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import FlowBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, count_tokens, padded, prompt_lengths
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS, NoiseLevel, x0_from_velocity

PATCH = 2  # latent pixels along a side of a token; fixed in the pipeline
MOST_TOKENS = 1024  # of a prompt, in the pipeline
NO_PROMPT = " "  # negative prompt of the model card; only a call with a negative prompt is guided
_OTHER_TASKS = ("zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")  # of editing and layered variants
_SHIFTS = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")


class QwenImage(FlowBackbone):
    """Backbone over a QwenImagePipeline directory."""

    pipeline_class = QwenImagePipeline
    component = "transformer"
    network_class = QwenImageTransformer2DModel
    autoencoder_class = AutoencoderKLQwenImage
    grid = "shifted"  # the pipeline gives its scheduler even sigmas from 1 to 1 / N, which are shifted once

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._check_sequence_length(MOST_TOKENS)
        if others := [name for name in _OTHER_TASKS if self._config.get(name)]:
            raise ValueError(f"{folder}: the transformer has {', '.join(others)}: give a text-to-image model")
        self._check_text_width(self._config["joint_attention_dim"])

    def load_model(self, folder: Path | None = None, **options: Any) -> nn.Module:
        """Load the network; weights whose output goes nowhere are frozen: processes wait for each trained gradient."""
        model = super().load_model(folder, **options)
        last = model.transformer_blocks[-1]  # its prompt tokens are dropped
        for part in (last.attn.to_add_out, last.txt_mlp):
            part.requires_grad_(False)
        return model

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        tokens = self.max_sequence_length
        texts = [prompt or NO_PROMPT for prompt in prompts]
        embeds, mask = self._text.encode_prompt(texts, self.device, max_sequence_length=tokens)
        if mask is None:  # no prompt is padded
            mask = embeds.new_ones(embeds.shape[:2])
        return padded([prompt[: int(length)] for prompt, length in zip(embeds, mask.sum(dim=1), strict=True)], tokens)

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {"prompt_embeds": (tokens, self._config["joint_attention_dim"]), "prompt_mask": (tokens,)}

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        longest, (height, width) = max(prompt_lengths(cond)), latents.shape[-2:]
        tokens = model(
            hidden_states=F.pixel_unshuffle(latents.to(self.dtype), PATCH).flatten(2).mT,
            encoder_hidden_states=cond["prompt_embeds"][:, :longest].to(self.dtype),
            encoder_hidden_states_mask=cond["prompt_mask"][:, :longest].bool(),
            timestep=level.timestep.flatten().expand(len(latents)) / NUM_TRAIN_TIMESTEPS,
            img_shapes=[[(1, height // PATCH, width // PATCH)]] * len(latents),
        ).sample
        velocity = F.pixel_shuffle(tokens.mT.unflatten(2, (height // PATCH, width // PATCH)), PATCH)
        return x0_from_velocity(latents, velocity.float(), level)

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Guide with the velocity of each token rescaled to the length of the conditional one."""
        cond, both = latents - cond_x0, latents - super().guide(cond_x0, uncond_x0, scale, latents, level)
        return latents - both * _token_norms(cond) / _token_norms(both)  # sigma times the velocity; it cancels

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {"true_cfg_scale": scale} if scale == 1 else {"true_cfg_scale": scale, "negative_prompt": NO_PROMPT}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        mean, std = (latents.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std))
        raw = latents * std + mean
        return (self._vae.decode(raw.unsqueeze(2)).sample.squeeze(2) / 2 + 0.5).clamp(0, 1)  # a video of one frame

    def distilled(self) -> str | None:
        return "the transformer has guidance_embeds" if self._config["guidance_embeds"] else None

    def _latent_sizes(self, vae: Mapping[str, Any]) -> tuple[int, int, int]:
        return vae["z_dim"], 2 ** len(vae["temperal_downsample"]), PATCH

    def _shift(self, num_steps: int | None = None) -> float:
        if not self._scheduler.get("use_dynamic_shifting"):
            return super()._shift(num_steps)
        tokens = math.prod(self.latent_shape[1:]) // PATCH**2
        return self._dynamic_shift(calculate_shift(tokens, *(self._scheduler[name] for name in _SHIFTS)))

    @cached_property
    def _text(self) -> QwenImagePipeline:
        return self._load_text(transformer=None)


def _token_norms(latents: Tensor) -> Tensor:
    """Root mean square of each token's numbers, at its latent pixels: [B, 1, H, W]."""
    squares = F.avg_pool2d(latents.square().mean(dim=1, keepdim=True), PATCH)
    return F.interpolate(squares.sqrt(), scale_factor=PATCH)


def _count(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Count the tokens of each prompt with the pipeline's template, of which it drops the beginning."""
    pipeline = QwenImagePipeline(None, None, None, tokenizer, None)
    texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
    return [count - pipeline.prompt_template_encode_start_idx for count in count_tokens(tokenizer, texts)]


def token_limits(_folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """The prompt and the end of the template have `max_sequence_length` tokens together."""
    return {"tokenizer": TokenLimit(max_sequence_length, _count)}


load = QwenImage  # called by `load_backbone`
