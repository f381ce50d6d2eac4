"""SDXL (diffusion): the only code that knows what SDXL predicts and how it is called.

The network returns the noise or the v-prediction, as the scheduler's config says. The second embedded
teacher is one of these.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Conditioning, TokenLimit, tokenizer_length, tokenizer_names
from dpdmd_pipeline.backbones.student_file import load_network, network_config
from dpdmd_pipeline.dpdmd.noise import (
    NoiseLevel,
    vp_level,
    vp_schedule,
    vp_schedule_at,
    x0_from_eps,
    x0_from_v_prediction,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusionXLPipeline

# diffusers' name of what the network returns -> ours, and how x0 follows from it
_PREDICTIONS = {"epsilon": ("eps", x0_from_eps), "v_prediction": ("v", x0_from_v_prediction)}
_BETAS = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")


class SDXL:
    """Backbone over a StableDiffusionXLPipeline directory.

    Attributes:
        folder: the teacher's directory.
        latent_shape: (C, H, W) at the configured resolution.
        prediction: eps or v.
        alphas_cumprod: [T] float32, the scheduler's own table of alpha^2.
    """

    def __init__(
        self,
        folder: Path,
        *,
        resolution: int,
        max_sequence_length: int,
        level_range: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel

        if max_sequence_length:
            raise ValueError(
                f"backbone.max_sequence_length is {max_sequence_length}: SDXL has no T5 encoder, set it to 0"
            )
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        self._config = unet = network_config(UNet2DConditionModel, self.folder / "unet")
        self.level_range, self.resolution = level_range, resolution
        self.prediction, self._to_x0, self.alphas_cumprod = _read_scheduler(self.folder)
        if unet["addition_embed_type"] != "text_time" or unet["in_channels"] != unet["out_channels"]:
            raise ValueError(
                f"{folder}: the UNet has addition_embed_type {unet['addition_embed_type']!r} and {unet['in_channels']} "
                f"to {unet['out_channels']} channels: only SDXL's text-to-image network (text_time, 4 to 4) is known"
            )
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        if resolution % factor:
            raise ValueError(f"backbone.resolution {resolution} must be a multiple of {factor}")
        self.latent_shape = (unet["in_channels"], resolution // factor, resolution // factor)
        index = StableDiffusionXLPipeline.load_config(folder)
        self._zeros_for_empty = index.get("force_zeros_for_empty_prompt", True)  # diffusers' own default
        self._vae: nn.Module | None = None
        self._text: StableDiffusionXLPipeline | None = None

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        from diffusers import UNet2DConditionModel

        dtype = torch.float32 if float32 else self.dtype
        return load_network(UNet2DConditionModel, Path(folder or self.folder / "unet"), dtype).to(self.device)

    def schedule(self, num_steps: int) -> NoiseLevel:
        return vp_schedule(num_steps, self.alphas_cumprod).to(self.device)

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        if grid == "trailing":
            return self.schedule(num_steps)
        if isinstance(grid, str):
            raise ValueError(f"grid is {grid!r}: SDXL knows trailing, or give the timesteps")
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
        if self._text is None:
            self._text = self._text_pipeline()
        embeds, _, pooled, _ = self._text.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        if self._zeros_for_empty:
            empty = torch.tensor([not prompt for prompt in prompts], device=self.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        return {"prompt_embeds": embeds, "pooled_embeds": pooled}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        # the UNet is given the pooled embedding and the six numbers of the picture's size side by side
        sizes = 6 * self._config["addition_time_embed_dim"]
        return {
            "prompt_embeds": (tokenizer_length(self.folder / "tokenizer"), self._config["cross_attention_dim"]),
            "pooled_embeds": (self._config["projection_class_embeddings_input_dim"] - sizes,),
        }

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        # of a picture that was neither scaled nor cropped: original size, crop, target size (arXiv:2307.01952, 2.2)
        size = [self.resolution, self.resolution, 0, 0, self.resolution, self.resolution]
        output = model(
            latents.to(self.dtype),
            level.timestep.flatten().expand(len(latents)),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            added_cond_kwargs={
                "text_embeds": cond["pooled_embeds"].to(self.dtype),
                "time_ids": torch.tensor([size], dtype=self.dtype, device=latents.device).expand(len(latents), -1),
            },
        ).sample
        return self._to_x0(latents, output.float(), level)

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float) -> Tensor:
        return uncond_x0 + scale * (cond_x0 - uncond_x0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            from diffusers import AutoencoderKL

            # SDXL's autoencoder overflows in float16
            vae = AutoencoderKL.from_pretrained(self.folder, subfolder="vae", dtype=torch.float32)
            self._vae = vae.to(self.device).requires_grad_(False)
        config = self._vae.config
        raw = latents / config.scaling_factor
        if config.latents_mean is not None and config.latents_std is not None:  # of some descendants of SDXL
            mean, std = (raw.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std))
            raw = raw * std + mean
        return (self._vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    def _text_pipeline(self) -> StableDiffusionXLPipeline:
        """Text encoders alone."""
        from diffusers import StableDiffusionXLPipeline

        pipeline = StableDiffusionXLPipeline.from_pretrained(
            self.folder, unet=None, vae=None, add_watermarker=False, dtype=self.dtype
        )
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
            encoder.to(self.device).requires_grad_(False)
        return pipeline


def _read_scheduler(folder: Path) -> tuple[str, Callable[[Tensor, Tensor, NoiseLevel], Tensor], Tensor]:
    """What the network returns, how x0 follows from it, and the table of alpha^2 [T].

    Raises:
        ValueError: if the config is not that of a diffusion model, or names a prediction that is not known.
    """
    from diffusers import DDIMScheduler

    config = DDIMScheduler.load_config(folder, subfolder="scheduler")
    if missing := [name for name in (*_BETAS, "prediction_type") if name not in config]:
        raise ValueError(f"{folder}: the scheduler's config has no {', '.join(missing)}: it is not one of SDXL")
    if (kind := config["prediction_type"]) not in _PREDICTIONS:
        raise ValueError(f"{folder}: the scheduler's prediction_type is {kind!r}: known are {', '.join(_PREDICTIONS)}")
    # Whatever sampler the folder names, the levels are those of its betas.
    betas = {name: config[name] for name in (*_BETAS, "trained_betas", "rescale_betas_zero_snr") if name in config}
    alphas_cumprod = DDIMScheduler(**betas).alphas_cumprod
    if kind == "epsilon" and alphas_cumprod[-1] == 0:
        raise ValueError(
            f"{folder}: the scheduler has rescale_betas_zero_snr with prediction_type 'epsilon': the noise alone says "
            "nothing of x0 at the first step; such models predict v_prediction"
        )
    return *_PREDICTIONS[kind], alphas_cumprod


def token_limits(folder: Path, _max_sequence_length: int) -> dict[str, TokenLimit]:
    """Each tokenizer cuts at its own length."""
    return {name: TokenLimit(tokenizer_length(folder / name)) for name in tokenizer_names(folder)}


def load(folder: Path, **options) -> SDXL:
    """The SDXL backbone over a teacher's folder."""
    return SDXL(folder, **options)
