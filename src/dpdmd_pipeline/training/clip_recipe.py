"""What the embedded CLIP is: every number of it that an environment chooses; see `teacher_recipe` for the others."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from dpdmd_pipeline.training.teacher_recipe import BatchFitRecipe


class ClipRecipe(BatchFitRecipe):
    """The embedded CLIP, from nothing."""

    seed: NonNegativeInt
    noise: float = Field(ge=0, lt=1)  # largest standard deviation added to a picture: models draw no perfect ones
    checkpoint_every: PositiveInt  # steps
