"""Recipes of the embedded teachers and of the embedded CLIP: every number that an environment chooses.

All others are constants: those of the training in `training/teacher.py`, those of the networks in `shapes/models.py`.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from dpdmd_pipeline.bounds import Count, Seed, Size, StrictModel


class FitRecipe(StrictModel):
    """Training of one network of the embedded teacher: AdamW on a one-cycle schedule."""

    steps: Count  # optimizer steps
    learning_rate: PositiveFloat  # peak


class BatchFitRecipe(FitRecipe):
    """Training on sampled batches."""

    batch_size: Size  # samples of one step


class DecoderRecipe(BatchFitRecipe):
    """Training of the autoencoder's decoder alone: the encoder, and so every latent, stays as it is."""

    noise: NonNegativeFloat  # on the latents, whose standard deviation is 1


class TeacherRecipe(StrictModel):
    """An embedded teacher, trained from scratch; the network that is given decides its family."""

    seed: Seed  # of initial weights and all draws
    max_length: Size  # tokens per prompt, start and end included
    shift: PositiveFloat | None  # of the flow-matching schedule; null with a unet, which has the noise levels of SDXL
    prompt_dropout: float = Field(ge=0, lt=1)  # share of empty prompts, for guidance
    text_encoders: FitRecipe  # every step sees all captions
    vae: BatchFitRecipe
    decoder: DecoderRecipe  # trained after the vae
    transformer: BatchFitRecipe | None = None  # of an SD3 teacher
    unet: BatchFitRecipe | None = None  # of an SDXL teacher
    checkpoint_every: Count  # steps between checkpoints

    @property
    def family(self) -> Literal["sd3", "sdxl"]:
        """Name of the teacher's backbone."""
        return "sd3" if self.transformer else "sdxl"

    @model_validator(mode="after")
    def _is_one_family(self) -> Self:
        if (self.transformer is None) == (self.unet is None):
            raise ValueError("give exactly one of transformer (an SD3 teacher) and unet (an SDXL teacher)")
        if (self.transformer is None) != (self.shift is None):
            raise ValueError(f"shift={self.shift}: a transformer needs a number, a unet needs null")
        return self


class ClipRecipe(BatchFitRecipe):
    """The embedded CLIP, trained from scratch."""

    seed: Seed  # of initial weights and all draws
    noise: float = Field(ge=0, lt=1)  # largest standard deviation added to an image: models draw imperfect ones
    checkpoint_every: Count  # steps between checkpoints
