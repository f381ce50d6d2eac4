"""Options of the sample stage."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dpdmd_pipeline.backbones.options import TeacherStart
from dpdmd_pipeline.bounds import LAST_SEED, Seed, Size, StrictModel


class SampleOptions(StrictModel):
    """Pictures to draw, and the form of the export to draw them from.

    A ComfyUI file and a LoRA file take the other components from the teacher.
    """

    form: Literal["diffusers", "comfyui", "lora"]
    prompts: Annotated[list[str], Field(min_length=1)]  # one row of the grid each
    seed: Seed  # of each prompt's first picture; the next ones have seed + 1, seed + 2, ...
    images_per_prompt: Size  # columns of the grid
    # height and width in pixels; null: the first size of the training
    size: Annotated[tuple[Size, Size], Field(strict=False)] | None
    batch_size: Size  # pictures drawn at once; does not change the pictures
    dtype: Literal["float32", "bfloat16", "float16"]  # of the networks
    device: Literal["auto", "cpu", "cuda"]  # of the networks
    teacher_start: TeacherStart | None  # let the teacher take the first steps, for more variety

    @model_validator(mode="after")
    def _last_seed_exists(self) -> Self:
        if self.seed + self.images_per_prompt - 1 > LAST_SEED:
            raise ValueError(
                f"seed={self.seed} with images_per_prompt={self.images_per_prompt} ends above the last seed; give at "
                f"most {LAST_SEED + 1 - self.images_per_prompt}"
            )
        return self
