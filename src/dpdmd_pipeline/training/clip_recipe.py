"""Recipe of the embedded CLIP: every number that an environment chooses; see `teacher_recipe` for the others."""

from __future__ import annotations

from pydantic import Field, NonNegativeInt, PositiveInt

from dpdmd_pipeline.training.teacher_recipe import BatchFitRecipe


class ClipRecipe(BatchFitRecipe):
    """The embedded CLIP, trained from scratch."""

    seed: NonNegativeInt  # of initial weights and all draws
    noise: float = Field(ge=0, lt=1)  # largest standard deviation added to an image: models draw imperfect ones
    checkpoint_every: PositiveInt  # steps between checkpoints
