"""SANA (flow matching): the only code that knows the output and the call of SANA's network.

A linear-attention transformer over a 32 times smaller latent, with one language model (arXiv:2410.10629).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import FlowBackbone
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit, count_tokens
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, x0_from_velocity


class Sana(FlowBackbone):
    """Backbone over a SanaPipeline directory."""

    pipeline_class = SanaPipeline
    component = "transformer"
    network_class = SanaTransformer2DModel
    autoencoder_class = AutoencoderDC

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        if not self.max_sequence_length:
            raise ValueError("backbone.max_sequence_length is 0: SANA needs a positive one, its own default is 300")
        if self._config.get("guidance_embeds"):
            raise ValueError(f"{folder}: the transformer has guidance_embeds: SANA-Sprint is already a student")
        self._timestep_scale = self._config.get("timestep_scale", 1.0)  # diffusers' own default

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conditioning:
        # The pipeline's call puts an instruction before every prompt except the empty one.
        filled = [index for index, prompt in enumerate(prompts) if prompt]
        empty = [index for index, prompt in enumerate(prompts) if not prompt]
        batches = [
            self._text.encode_prompt(
                [prompts[index] for index in indices],
                do_classifier_free_guidance=False,
                device=self.device,
                max_sequence_length=self.max_sequence_length,
                complex_human_instruction=instruction,
            )[:2]
            for indices, instruction in ((filled, _instruction()), (empty, None))
            if indices
        ]
        order = torch.tensor(filled + empty, device=self.device).argsort()
        embeds, mask = (torch.cat(values)[order] for values in zip(*batches, strict=True))
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

    @cached_property
    def _text(self) -> SanaPipeline:
        return self._load_text(transformer=None)


def _instruction() -> list[str]:
    """Lines that the pipeline's call puts before every prompt."""
    return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def token_limits(_folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """The prompt has `max_sequence_length` - 2 tokens beyond those of the instruction alone."""
    return {"tokenizer": TokenLimit(max_sequence_length - 2, _count_after_instruction)}


def _count_after_instruction(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Count the tokens that each prompt adds to the instruction, normalised as the pipeline does it."""
    instruction = "\n".join(_instruction())
    texts = [instruction, *(instruction + prompt.lower().strip() for prompt in prompts)]
    alone, *together = count_tokens(tokenizer, texts)
    return [tokens - alone for tokens in together]


load = Sana  # called by `load_backbone`
