"""SD3 and SD3.5 (flow matching): the only code that knows what SD3 predicts and how it is called.

The embedded shapes teacher is one of these.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Conditioning, TokenLimit, tokenizer_length, tokenizer_names
from dpdmd_pipeline.backbones.student_file import load_network, network_config
from dpdmd_pipeline.dpdmd.noise import (
    NoiseLevel,
    flow_student_schedule,
    random_flow_level,
    x0_from_velocity,
)

if TYPE_CHECKING:
    from diffusers import StableDiffusion3Pipeline


class SD3:
    """Backbone over a StableDiffusion3Pipeline directory.

    Attributes:
        folder: the teacher's directory.
        latent_shape: (C, H, W) at the configured resolution.
    """

    prediction = "flow"

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
        from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        self._config = transformer = network_config(SD3Transformer2DModel, self.folder / "transformer")
        self.max_sequence_length, self.level_range = max_sequence_length, level_range
        scheduler = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
        if scheduler.get("use_dynamic_shifting"):
            raise ValueError(f"{folder}: the scheduler shifts dynamically, SD3 and SD3.5 use a static shift")
        self.shift = scheduler["shift"]
        vae = AutoencoderKL.load_config(folder, subfolder="vae")
        factor = 2 ** (len(vae["block_out_channels"]) - 1)
        if resolution % (factor * transformer["patch_size"]):
            raise ValueError(
                f"backbone.resolution {resolution} must be a multiple of {factor * transformer['patch_size']}"
            )
        self.latent_shape = (transformer["in_channels"], resolution // factor, resolution // factor)
        self._vae: nn.Module | None = None
        self._text: StableDiffusion3Pipeline | None = None

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        from diffusers import SD3Transformer2DModel

        dtype = torch.float32 if float32 else self.dtype
        return load_network(SD3Transformer2DModel, Path(folder or self.folder / "transformer"), dtype).to(self.device)

    def schedule(self, num_steps: int) -> NoiseLevel:
        return flow_student_schedule("diffusers", num_steps, self.shift).to(self.device)

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        return flow_student_schedule(grid, num_steps, self.shift).to(self.device)

    def random_level(self, uniform: Tensor) -> NoiseLevel:
        return random_flow_level(uniform, self.level_range, self.shift).to(self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        if self._text is None:
            self._text = self._text_pipeline()
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

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float) -> Tensor:
        return uncond_x0 + scale * (cond_x0 - uncond_x0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            from diffusers import AutoencoderKL

            self._vae = (
                AutoencoderKL.from_pretrained(self.folder, subfolder="vae").to(self.device).requires_grad_(False)
            )
        raw = latents / self._vae.config.scaling_factor + self._vae.config.shift_factor
        return (self._vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    def _text_pipeline(self) -> StableDiffusion3Pipeline:
        """Text encoders alone: the pipeline with a weightless transformer, whose config encode_prompt reads."""
        from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

        config = SD3Transformer2DModel.load_config(self.folder, subfolder="transformer")
        with torch.device("meta"):
            transformer = SD3Transformer2DModel.from_config(config)
        without_t5 = {} if (self.folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            self.folder, transformer=transformer, vae=None, dtype=self.dtype, **without_t5
        )
        for encoder in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
            if encoder is not None:
                encoder.to(self.device).requires_grad_(False)
        return pipeline


def token_limits(folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """T5's tokens are cut at `max_sequence_length`, both CLIPs' at the length of the first."""
    clip = TokenLimit(tokenizer_length(folder / "tokenizer"))
    t5 = TokenLimit(max_sequence_length)
    return {name: t5 if name == "tokenizer_3" else clip for name in tokenizer_names(folder)}


def load(folder: Path, **options) -> SD3:
    """The SD3 backbone over a teacher's folder."""
    return SD3(folder, **options)
