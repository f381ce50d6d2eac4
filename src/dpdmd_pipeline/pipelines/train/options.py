"""Options of the train stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.training.recipe import Recipe


class TrainOptions(Recipe):
    """A recipe and how it is carried out; what is named here does not change the student."""

    device: Literal["auto", "cpu", "cuda"]
    gradient_checkpointing: bool  # less memory, one more forward pass per graded one
    student_micro_batch: PositiveInt  # samples that one backward pass sees
    fake_score_micro_batch: PositiveInt
    checkpoint_every: PositiveInt  # steps
    keep_last: PositiveInt  # checkpoints kept while training; a damaged one is passed over for the one before
    fetch_every: PositiveInt  # steps between fetches of the losses from the device
    ratio_every: PositiveInt  # steps between measurements of the two gradients' norms
    log_every: PositiveInt  # steps between lines in the log
    launch: LaunchOptions

    @model_validator(mode="after")
    def _is_shared_evenly(self) -> Self:
        if self.batch_size % self.launch.total:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared evenly by {self.launch.total} processes "
                f"(launch: {self.launch.processes} on each of {self.launch.machines} machines)"
            )
        return self

    def recipe(self) -> Recipe:
        """Only what decides the result."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))
