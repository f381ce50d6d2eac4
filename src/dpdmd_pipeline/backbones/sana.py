"""SANA (flow matching): the only code that knows what SANA predicts and how it is called.

A linear-attention transformer over a 32 times smaller latent, under one language model (arXiv:2410.10629).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Conditioning, TokenLimit, count_tokens
from dpdmd_pipeline.backbones.student_file import load_network, network_config
from dpdmd_pipeline.dpdmd.noise import (
    NoiseLevel,
    flow_student_schedule,
    random_flow_level,
    x0_from_velocity,
)

if TYPE_CHECKING:
    from diffusers import SanaPipeline


class Sana:
    """Backbone over a SanaPipeline directory.

    Attributes:
        folder: the teacher's directory.
        latent_shape: (C, H, W) at the configured resolution.
        shift: of the teacher's schedule.
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
        from diffusers import AutoencoderDC, SanaTransformer2DModel

        if not max_sequence_length:
            raise ValueError(
                "backbone.max_sequence_length is 0: SANA's text encoder needs some, its own default is 300"
            )
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        self._config = transformer = network_config(SanaTransformer2DModel, self.folder / "transformer")
        self.max_sequence_length, self.level_range = max_sequence_length, level_range
        self.shift = _read_shift(self.folder)
        if transformer.get("guidance_embeds"):
            raise ValueError(f"{folder}: the transformer has guidance_embeds: SANA-Sprint is a student already")
        self._timestep_scale = transformer.get("timestep_scale", 1.0)  # diffusers' own default
        vae = AutoencoderDC.load_config(folder, subfolder="vae")
        factor = 2 ** (len(vae["encoder_block_out_channels"]) - 1)
        if resolution % (factor * transformer["patch_size"]):
            raise ValueError(
                f"backbone.resolution {resolution} must be a multiple of {factor * transformer['patch_size']}"
            )
        self.latent_shape = (transformer["in_channels"], resolution // factor, resolution // factor)
        self._vae: nn.Module | None = None
        self._text: SanaPipeline | None = None

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        from diffusers import SanaTransformer2DModel

        dtype = torch.float32 if float32 else self.dtype
        return load_network(SanaTransformer2DModel, Path(folder or self.folder / "transformer"), dtype).to(self.device)

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
        # The pipeline's call puts an instruction before every prompt, and none before the empty one.
        filled = [index for index, prompt in enumerate(prompts) if prompt]
        empty = [index for index, prompt in enumerate(prompts) if not prompt]
        parts = [
            self._text.encode_prompt(
                [prompts[index] for index in chosen],
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                complex_human_instruction=before,
            )[:2]
            for chosen, before in ((filled, _instruction()), (empty, None))
            if chosen
        ]
        place = torch.tensor(filled + empty, device=self.device).argsort()
        embeds, mask = (torch.cat(part)[place] for part in zip(*parts, strict=True))
        return {"prompt_embeds": embeds, "prompt_mask": mask.to(self.dtype)}

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        tokens = self.max_sequence_length
        return {"prompt_embeds": (tokens, self._config["caption_channels"]), "prompt_mask": (tokens,)}

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        velocity = model(
            latents.to(self.dtype),
            encoder_hidden_states=cond["prompt_embeds"].to(self.dtype),
            encoder_attention_mask=cond["prompt_mask"],
            timestep=level.timestep.flatten().expand(len(latents)) * self._timestep_scale,
        ).sample
        velocity = velocity[:, : latents.shape[1]]  # some networks also return a learned variance
        return x0_from_velocity(latents, velocity.float(), level)

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float) -> Tensor:
        return uncond_x0 + scale * (cond_x0 - uncond_x0)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        if self._vae is None:
            from diffusers import AutoencoderDC

            vae = AutoencoderDC.from_pretrained(self.folder, subfolder="vae", dtype=torch.float32)
            self._vae = vae.to(self.device).requires_grad_(False)
        return (self._vae.decode(latents / self._vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    def _text_pipeline(self) -> SanaPipeline:
        """The text encoder alone."""
        from diffusers import SanaPipeline

        pipeline = SanaPipeline.from_pretrained(self.folder, transformer=None, vae=None, dtype=self.dtype)
        pipeline.text_encoder.to(self.device).requires_grad_(False)
        return pipeline


def _instruction() -> list[str]:
    """Lines that the pipeline's call puts before every prompt."""
    from diffusers import SanaPipeline

    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def token_limits(_folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """The pipeline gives the prompt `max_sequence_length` - 2 tokens beyond those of the instruction alone."""
    return {"tokenizer": TokenLimit(max_sequence_length - 2, _count_after_instruction)}


def _count_after_instruction(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Tokens that each prompt adds to the instruction, spelt as the pipeline spells it."""
    before = "\n".join(_instruction())
    alone, *together = count_tokens(tokenizer, [before, *(before + prompt.lower().strip() for prompt in prompts)])
    return [tokens - alone for tokens in together]


def _read_shift(folder: Path) -> float:
    """The static shift of the teacher's schedule, under the name that its sampler gives it.

    Raises:
        ValueError: if the scheduler's config is not that of a flow model with a static shift.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler")
    if config.get("use_dynamic_shifting"):
        raise ValueError(f"{folder}: the scheduler shifts dynamically, SANA uses a static shift")
    if "shift" in config:
        return config["shift"]
    if config.get("prediction_type") == "flow_prediction":  # DPM++, SANA's default
        return config["flow_shift"]
    raise ValueError(f"{folder}: the scheduler's config has neither shift nor flow_prediction: it is not one of SANA")


def load(folder: Path, **options) -> Sana:
    """The SANA backbone over a teacher's folder."""
    return Sana(folder, **options)
