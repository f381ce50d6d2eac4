"""What a distillation is: every number that changes the anchors or the student."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

Grid = Literal["diffusers", "shifted"]
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
NOT_IN_THE_RESULT = {"device", "batch_size"}  # of AnchorRecipe


class AnchorLevel(BaseModel):
    """Where on the teacher's schedule an anchor lies: by its number of steps, or by its noise level."""

    model_config = STRICT

    steps: PositiveInt | None = None  # K
    sigma: float | None = Field(default=None, gt=0, lt=1)  # the teacher's level nearest to this

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.sigma is None):
            raise ValueError("give exactly one of steps and sigma")
        return self


class AnchorRecipe(BaseModel):
    """Which anchors are computed, and how they are kept."""

    model_config = STRICT

    mode: Literal["cached", "online"]
    anchor_levels: list[AnchorLevel] = Field(min_length=1)
    with_denoised: bool  # also the teacher's x0 at each anchor, which train.target=tangent needs
    seed: NonNegativeInt
    seeds_per_prompt: PositiveInt
    batch_size: PositiveInt
    shard_size: PositiveInt
    dtype: Literal["float32", "float16"]
    device: Literal["auto", "cpu", "cuda"]


Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerRecipe(BaseModel):
    """AdamW for one network."""

    model_config = STRICT

    learning_rate: PositiveFloat
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML has lists, no tuples
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat


class Recipe(BaseModel):
    """One distilled student. Vanilla DMD is the recipe without anchored steps and without stop-gradient."""

    model_config = STRICT

    seed: NonNegativeInt
    max_steps: PositiveInt  # student turns
    decay: float = Field(ge=0, le=1)  # last share of the turns, in which the student's learning rate falls towards 0
    batch_size: PositiveInt  # per turn, of the student and of the fake score
    num_steps: PositiveInt  # N, network evaluations of the student
    grid: Grid | list[float]  # named, or the N falling levels themselves
    anchored_steps: NonNegativeInt  # how many first steps follow the teacher; 1 in the paper
    diversity_weight: NonNegativeFloat  # lambda
    stop_gradient: bool  # keep L_DMD from the anchored steps
    target: Literal["secant", "tangent"]
    space: Literal["x0", "v", "eps"]
    normalizer: Literal["noisy", "x0"]
    fake_score_turns: PositiveInt  # per student turn
    student: OptimizerRecipe
    fake_score: OptimizerRecipe

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.anchored_steps >= self.num_steps:
            raise ValueError(f"anchored_steps={self.anchored_steps} must be below num_steps={self.num_steps}")
        if self.anchored_steps == 0 and (self.diversity_weight > 0 or self.stop_gradient):
            raise ValueError("anchored_steps=0 is vanilla DMD: set diversity_weight=0 and stop_gradient=false with it")
        if isinstance(self.grid, list):
            if len(self.grid) != self.num_steps:
                raise ValueError(f"grid has {len(self.grid)} levels, num_steps={self.num_steps} needs as many")
            if any(a <= b for a, b in zip(self.grid, [*self.grid[1:], 0.0], strict=True)) or self.grid[0] > 1:
                raise ValueError(f"grid={self.grid} must fall strictly from at most 1 and stay above 0")
        return self


class FitRecipe(BaseModel):
    """How one network of the embedded teacher is trained: AdamW on a one-cycle schedule."""

    model_config = STRICT

    steps: PositiveInt
    learning_rate: PositiveFloat  # peak


class BatchFitRecipe(FitRecipe):
    """The same with sampled batches."""

    batch_size: PositiveInt


class TeacherRecipe(BaseModel):
    """The embedded teacher, from nothing."""

    model_config = STRICT

    seed: NonNegativeInt
    max_length: PositiveInt  # tokens per prompt, start and end included
    shift: PositiveFloat  # of the flow-matching schedule
    prompt_dropout: float = Field(ge=0, lt=1)  # share of empty prompts, for guidance
    text_encoders: FitRecipe  # every step sees all captions
    vae: BatchFitRecipe
    transformer: BatchFitRecipe
    checkpoint_every: PositiveInt  # steps
