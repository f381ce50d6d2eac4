"""SDXL (diffusion): the only code that knows the output and the call of SDXL's network.

The scheduler's config says if the network returns the noise or the v-prediction. The second embedded teacher is an
SDXL.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import PipelineBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, tokenizer_length, tokenizer_names
from dpdmd_pipeline.dpdmd.noise import (
    NoiseLevel,
    vp_level,
    vp_schedule,
    vp_schedule_at,
    x0_from_eps,
    x0_from_v_prediction,
)

# diffusers' prediction type -> our name, and the function that converts it to x0
_PREDICTIONS = {"epsilon": ("eps", x0_from_eps), "v_prediction": ("v", x0_from_v_prediction)}
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


class SDXL(PipelineBackbone):
    """Backbone over a StableDiffusionXLPipeline directory."""

    pipeline_class = StableDiffusionXLPipeline
    component = "unet"
    network_class = UNet2DConditionModel
    autoencoder_class = AutoencoderKL

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        unet = self._config
        if self.max_sequence_length:
            raise ValueError(
                f"backbone.max_sequence_length is {self.max_sequence_length}: SDXL has no T5 encoder, set it to 0"
            )
        if unet["addition_embed_type"] != "text_time" or unet["in_channels"] != unet["out_channels"]:
            raise ValueError(
                f"{folder}: the UNet has addition_embed_type {unet['addition_embed_type']!r} and {unet['in_channels']} "
                f"to {unet['out_channels']} channels: give a text-to-image network of SDXL (text_time, 4 to 4)"
            )
        self.prediction, self._to_x0, self.alphas_cumprod = _read_scheduler(self.folder)
        index = StableDiffusionXLPipeline.load_config(folder)
        self._zeros_for_empty = index.get("force_zeros_for_empty_prompt", True)  # diffusers' own default

    def schedule(self, num_steps: int) -> NoiseLevel:
        return vp_schedule(num_steps, self.alphas_cumprod).to(self.device)

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        if grid == "trailing":
            return self.schedule(num_steps)
        if isinstance(grid, str):
            raise ValueError(f"grid is {grid!r}: choose trailing for SDXL, or give the timesteps")
        if len(grid) != num_steps:
            raise ValueError(f"grid has {len(grid)} timesteps, num_steps={num_steps} needs as many")
        return vp_schedule_at(grid, self.alphas_cumprod).to(self.device)

    def random_level(self, uniform: Tensor) -> NoiseLevel:
        low, high = self.level_range
        total = len(self.alphas_cumprod)
        timestep = ((low + (high - low) * uniform) * total).long().clamp(max=total - 1)
        return vp_level(timestep.view(-1, 1, 1, 1).cpu(), self.alphas_cumprod).to(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self._text.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        if self._zeros_for_empty:
            empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        # the UNet takes the pooled embedding and six numbers (sizes and crop) side by side
        sizes = 6 * self._config["addition_time_embed_dim"]
        return {
            "prompt_embeds": (tokenizer_length(self.folder / "tokenizer"), self._config["cross_attention_dim"]),
            "pooled_embeds": (self._config["projection_class_embeddings_input_dim"] - sizes,),
        }

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        # original size, crop, target size of a picture without scaling and cropping (arXiv:2307.01952, 2.2)
        height, width = (side * self._pixels for side in latents.shape[-2:])
        sizes = latents.new_full((len(latents), 6), height, dtype=self.dtype)  # made on the device
        sizes[:, 1::2], sizes[:, 2:4] = width, 0
        output = model(
            latents.to(self.dtype),
            level.timestep.flatten().expand(len(latents)),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            added_cond_kwargs={
                "text_embeds": cond["pooled_embeds"].to(self.dtype),
                "time_ids": sizes,
            },
        ).sample
        return self._to_x0(latents, output.float(), level)

    @cached_property
    def _text(self) -> StableDiffusionXLPipeline:
        return self._load_text(unet=None, add_watermarker=False)


def _read_scheduler(folder: Path) -> tuple[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor], Tensor]:
    """Read the prediction (eps or v), its conversion to x0, and the table of alpha^2, [T] in float32."""
    config = DDIMScheduler.load_config(folder, subfolder="scheduler")
    if missing := [name for name in (*_BETAS, "prediction_type") if name not in config]:
        raise ValueError(f"{folder}: the scheduler's config has no {', '.join(missing)}: give a teacher of SDXL")
    if (kind := config["prediction_type"]) not in _PREDICTIONS:
        raise ValueError(f"{folder}: the scheduler's prediction_type is {kind!r}, not {' or '.join(_PREDICTIONS)}")
    # The levels follow from the betas alone, whatever the scheduler's class.
    betas = {name: config[name] for name in (*_BETAS, "trained_betas", "rescale_betas_zero_snr") if name in config}
    alphas_cumprod = DDIMScheduler(**betas).alphas_cumprod
    if kind == "epsilon" and alphas_cumprod[-1] == 0:
        raise ValueError(
            f"{folder}: the scheduler has rescale_betas_zero_snr with prediction_type 'epsilon': at the first step the "
            "noise does not determine x0; such models need v_prediction"
        )
    return *_PREDICTIONS[kind], alphas_cumprod


def token_limits(folder: Path, _max_sequence_length: int) -> dict[str, TokenLimit]:
    """Each tokenizer cuts at its own length."""
    return {name: TokenLimit(tokenizer_length(folder / name)) for name in tokenizer_names(folder)}


load = SDXL  # called by `load_backbone`
