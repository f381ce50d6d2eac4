"""Options of the train stage."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt

from dpdmd_pipeline.training.recipe import Recipe


class TrainOptions(Recipe):
    """A recipe and how it is carried out; what is named here does not change the student."""

    device: Literal["auto", "cpu", "cuda"]
    checkpoint_every: PositiveInt  # steps
    ratio_every: PositiveInt  # steps between measurements of the two gradients' norms
    log_every: PositiveInt  # steps between lines in the log

    def recipe(self) -> Recipe:
        """Only what decides the result."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))
