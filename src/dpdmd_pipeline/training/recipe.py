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

from dpdmd_pipeline.training.launch_options import LaunchOptions

Grid = Literal["diffusers", "shifted", "trailing"]  # flow has the first two, diffusion (VP) models the third
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
NOT_IN_THE_RESULT = {"device", "batch_size", "launch"}  # of AnchorRecipe


class StudentGrid(BaseModel):
    """The schedule of a student."""

    model_config = STRICT

    grid: Grid | list[float]
    num_steps: PositiveInt


class AnchorLevel(BaseModel):
    """Where on the teacher's schedule an anchor lies: by its number of steps, its noise level, or a student's schedule.

    A sigma is in the model's own terms: of flow below 1, of a diffusion model sigma / alpha, up to 14.6 for SDXL.
    """

    model_config = STRICT

    steps: PositiveInt | None = None  # K
    sigma: PositiveFloat | None = None  # the teacher's level nearest to this
    first_step: StudentGrid | None = None  # the teacher's level nearest to where this student's first step lands

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(value is not None for value in (self.steps, self.sigma, self.first_step)) != 1:
            raise ValueError("give exactly one of steps, sigma and first_step")
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
    launch: LaunchOptions


Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class OptimizerRecipe(BaseModel):
    """AdamW for one network."""

    model_config = STRICT

    kind: Literal["adamw", "adamw_8bit"]  # the second keeps its moments in 8 bits; needs bitsandbytes and CUDA
    learning_rate: PositiveFloat
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # YAML has lists, no tuples
    weight_decay: NonNegativeFloat
    max_grad_norm: PositiveFloat


class LoraRecipe(BaseModel):
    """Low-rank adapters of the student and of the fake score on one frozen base."""

    model_config = STRICT

    student_rank: PositiveInt
    fake_score_rank: PositiveInt
    alpha_per_rank: PositiveFloat  # an adapter adds this times its low-rank product, whatever its rank
    targets: list[str] = Field(min_length=1)  # endings of the names of the layers that are adapted


class WatchRecipe(BaseModel):
    """What is measured of the student while it learns, and which of its turns is kept; see `training.watch`."""

    model_config = STRICT

    every: NonNegativeInt  # student turns between measurements; 0: none at all
    prompts: PositiveInt  # at most, of those that are trained on
    images_per_prompt: Annotated[int, Field(ge=2)]
    level: Share  # how far up the noise levels of training the teacher corrects; 0 the lowest, 1 the highest
    keep: Literal["last", "best"]  # the student after the last turn, or after the best of those measured
    diversity_floor: Share  # share of the teacher's latent diversity that a turn must have to be the best

    @model_validator(mode="after")
    def _measures_what_it_keeps(self) -> Self:
        if self.keep == "best" and not self.every:
            raise ValueError("keep=best needs measurements: set every, the student turns between them")
        return self


class Recipe(BaseModel):
    """One distilled student. Vanilla DMD is the recipe without anchored steps and without stop-gradient."""

    model_config = STRICT

    roles: Literal["full", "lora"]  # three networks, or one frozen base with two adapters
    lora: LoraRecipe  # read where roles=lora
    precision: Literal["float32", "bfloat16"]  # of the trained networks' arithmetic; their weights are float32
    seed: NonNegativeInt
    max_steps: PositiveInt  # student turns
    warmup: NonNegativeInt  # first turns, in which the student's learning rate rises to its full value
    decay: float = Field(ge=0, le=1)  # last share of the turns, in which the student's learning rate falls towards 0
    ema: float = Field(ge=0, lt=1)  # the kept student's weights average about 1 / (1 - ema) turns; 0: the last ones
    batch_size: PositiveInt  # per turn, of the student and of the fake score, over all processes
    num_steps: PositiveInt  # N, network evaluations of the student
    grid: Grid | list[float]  # named, or the N falling levels themselves: sigmas of flow, timesteps of diffusion models
    between_steps: Literal["ode", "renoise"]  # keep the noise that a prediction implies, or add fresh noise
    anchored_steps: NonNegativeInt  # how many first steps follow the teacher; 1 in the paper
    diversity_weight: NonNegativeFloat  # lambda, or what balanced weighting makes of it
    # balanced: lambda such that |lambda grad L_div| = diversity_weight |grad L_DMD| (arXiv:2012.09841, eq. 7)
    weighting: Literal["fixed", "balanced"]
    balance_every: PositiveInt  # student turns between measurements of these norms; read where weighting=balanced
    balance_ema: float = Field(ge=0, lt=1)  # share of the earlier measurements in lambda at each; read there, too
    # noise shares, sigma of flow, between which L_DMD's teacher is guided (arXiv:2404.07724); [0, 1]: at every level
    guidance_interval: Annotated[tuple[Share, Share], Field(strict=False)]
    stop_gradient: bool  # keep L_DMD from the anchored steps
    target: Literal["secant", "tangent"]
    space: Literal["x0", "v", "eps"]
    normalizer: Literal["noisy", "x0"]
    graded_steps: Literal["all", "last", "random"]  # which of the steps after the anchored ones L_DMD trains, per turn
    fake_score_turns: PositiveInt  # per student turn
    fake_score_warmup: NonNegativeInt  # turns of the fake score before the student's first
    fake_rollout: Literal["fresh", "shared"]  # the student's pictures: drawn for each of these turns, or once for all
    student: OptimizerRecipe
    fake_score: OptimizerRecipe
    watch: WatchRecipe

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.anchored_steps >= self.num_steps:
            raise ValueError(f"anchored_steps={self.anchored_steps} must be below num_steps={self.num_steps}")
        if self.anchored_steps == 0 and (self.diversity_weight > 0 or self.stop_gradient):
            raise ValueError("anchored_steps=0 is vanilla DMD: set diversity_weight=0 and stop_gradient=false with it")
        if self.weighting == "balanced" and not (self.anchored_steps and self.diversity_weight):
            raise ValueError(
                f"weighting=balanced holds two losses against each other: with anchored_steps={self.anchored_steps}, "
                f"diversity_weight={self.diversity_weight} there is one, set weighting=fixed with them"
            )
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={list(self.guidance_interval)} must rise; [0.0, 1.0] is every level")
        if self.graded_steps != "all" and self.anchored_steps and not self.stop_gradient:
            raise ValueError(
                f"graded_steps={self.graded_steps} sends no gradient into the anchored steps: "
                "set stop_gradient=true with it"
            )
        if self.watch.keep == "best" and self.ema:
            raise ValueError(f"watch.keep=best keeps one turn's weights, ema={self.ema} averages many: set ema=0.0")
        if isinstance(self.grid, list):
            if len(self.grid) != self.num_steps:
                raise ValueError(f"grid has {len(self.grid)} levels, num_steps={self.num_steps} needs as many")
            if any(a <= b for a, b in zip(self.grid, [*self.grid[1:], 0.0], strict=True)):
                raise ValueError(f"grid={self.grid} must fall strictly and stay above 0")
        return self
