"""Options of the sample stage."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from dpdmd_pipeline.backbones.options import TeacherStart


class SampleOptions(BaseModel):
    """Pictures to draw, and the form of the export to draw them from.

    A ComfyUI file and a LoRA file take the other components from the teacher.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    form: Literal["diffusers", "comfyui", "lora"]
    prompts: Annotated[list[str], Field(min_length=1)]  # one row of the grid each
    seed: NonNegativeInt  # of each prompt's first picture; the next ones have seed + 1, seed + 2, ...
    images_per_prompt: PositiveInt  # columns of the grid
    batch_size: PositiveInt  # pictures drawn at once; does not change the pictures
    dtype: Literal["float32", "bfloat16", "float16"]  # of the networks
    device: Literal["auto", "cpu", "cuda"]  # of the networks
    teacher_start: TeacherStart | None = None  # let the teacher take the first steps, for more variety
