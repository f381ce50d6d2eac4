"""Options of the sample stage."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt


class SampleOptions(BaseModel):
    """Pictures to draw, and the form of the export to draw them from.

    Attributes:
        form: diffusers folder, ComfyUI file or LoRA file; the last two take the other components from the teacher.
        prompts: one row of the grid each.
        seed: of each prompt's first picture; the next ones have seed + 1, seed + 2, ...
        images_per_prompt: columns of the grid.
        batch_size: pictures drawn at once; does not change the pictures.
        dtype: of the networks.
        device: of the networks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: Literal["diffusers", "comfyui", "lora"]
    prompts: Annotated[list[str], Field(min_length=1)]
    seed: NonNegativeInt
    images_per_prompt: PositiveInt
    batch_size: PositiveInt
    dtype: Literal["float32", "bfloat16", "float16"]
    device: Literal["auto", "cpu", "cuda"]
