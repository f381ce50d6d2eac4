"""Recipes of anchors and of a student: every option that changes them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from dpdmd_pipeline.backbones.options import BaseWeights
from dpdmd_pipeline.bounds import Count, CountOrZero, Few, Pairs, Seed, Size, StrictModel
from dpdmd_pipeline.training.launch_options import LaunchOptions

Precision = Literal["float32", "bfloat16"]
Grid = Literal["diffusers", "shifted", "trailing"]  # flow models have the first two, diffusion (VP) models the third
NOT_IN_THE_RESULT = {"device", "batch_size", "launch"}  # fields of AnchorRecipe that change no anchor


class StudentGrid(StrictModel):
    """Schedule of a student."""

    grid: Grid | list[float]  # as in Recipe
    num_steps: Few  # as in Recipe


class AnchorLevel(StrictModel):
    """An anchor's level on the teacher's schedule, given in exactly one of three ways.

    A sigma is in the model's own terms: below 1 for flow models; sigma / alpha for diffusion models (SDXL: up to 14.6).
    """

    steps: Few | None = None  # K, sampling steps of the teacher
    sigma: PositiveFloat | None = None  # the teacher's level nearest to this noise level
    first_step: StudentGrid | None = None  # the teacher's level nearest to the end of this student's first step

    @model_validator(mode="after")
    def _is_given_once(self) -> Self:
        if sum(value is not None for value in (self.steps, self.sigma, self.first_step)) != 1:
            raise ValueError("give exactly one of steps, sigma and first_step")
        return self


class AnchorRecipe(StrictModel):
    """Anchors to compute, and their cache."""

    mode: Literal["cached", "online"]  # computed once and stored, or in each student update
    anchor_levels: list[AnchorLevel] = Field(min_length=1)  # in falling order of noise
    with_denoised: bool  # also store the teacher's x0 at each anchor, which train.target=tangent needs
    seed: Seed  # of the noise
    seeds_per_prompt: Size  # anchors of each prompt in the cache
    batch_size: Size  # samples that the teacher denoises at once
    shard_size: Size  # samples in one file of the cache
    dtype: Literal["float32", "float16"]  # of the stored latents
    device: Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is a GPU
    launch: LaunchOptions  # processes that share the shards


Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class OptimizerRecipe(StrictModel):
    """AdamW for one network."""

    kind: Literal["adamw", "adamw_8bit"]  # adamw_8bit stores its moments in 8 bits; needs bitsandbytes and CUDA
    learning_rate: PositiveFloat  # the student's follows Recipe.warmup and Recipe.decay
    betas: Annotated[tuple[Beta, Beta], Field(strict=False)]  # decay rates of the moments; YAML has lists, no tuples
    weight_decay: NonNegativeFloat  # decoupled, as in AdamW
    max_grad_norm: PositiveFloat  # gradients are clipped to this norm


class LoraRecipe(StrictModel):
    """Low-rank adapters of the student and the fake score on one frozen base."""

    student_rank: Size  # of the student's low-rank products
    fake_score_rank: Size  # of the fake score's
    alpha_per_rank: PositiveFloat  # scale of an adapter's low-rank product, independent of its rank
    targets: list[str] = Field(min_length=1)  # adapted layers, by the endings of their names
    # Storage of the base, which is the teacher of the training: fewer bits take less memory and change it a little
    base_weights: BaseWeights


class WatchRecipe(StrictModel):
    """Measurements of the student while it trains, and the choice of the final weights; see `training.watch`."""

    every: CountOrZero  # cycles between measurements; 0: none
    prompts: Count  # training prompts to measure, at most
    images_per_prompt: Pairs  # samples of each
    level: Share  # noise level of the teacher's correction: 0 the lowest of training, 1 the highest
    keep: Literal["last", "best"]  # the student of the last cycle, or of the best measured one
    diversity_floor: Share  # the best cycle must have this share of the teacher's latent diversity

    @model_validator(mode="after")
    def _best_is_measured(self) -> Self:
        if self.keep == "best" and not self.every:
            raise ValueError(f"keep=best needs measurements, every={self.every}: set every to some number of cycles")
        return self


class Recipe(StrictModel):
    """One distilled student. Vanilla DMD is the recipe without anchored steps and without stop-gradient."""

    # Networks
    roles: Literal["full", "lora"]  # three networks, or one frozen base with two adapters
    lora: LoraRecipe  # read if roles=lora
    precision: Precision  # of the trained networks' arithmetic; their weights are float32
    # Warm start: file or folder with the weights that student and fake score begin with, see `backbones.start`; null:
    # the teacher's
    start_from: Annotated[str, Field(min_length=1)] | None
    fake_score_from: Literal["start", "teacher"]  # weights that the fake score begins with

    # Length of the run, and the student's optimization
    seed: Seed  # of all random draws
    max_steps: Count  # cycles: student updates, each after its fake-score updates
    warmup: CountOrZero  # first cycles, in which the student's learning rate rises to its full value
    decay: float = Field(ge=0, le=1)  # last share of the cycles, in which the student's learning rate falls towards 0
    ema: float = Field(ge=0, lt=1)  # the final weights average about 1 / (1 - ema) cycles; 0: those of the last cycle
    batch_size: Size  # samples of one update, of the student and of the fake score, over all processes

    # The student's sampler
    num_steps: Few  # N, network evaluations of the student
    grid: Grid | list[float]  # a named schedule, or N falling levels: sigmas (flow) or timesteps (diffusion models)
    between_steps: Literal["ode", "renoise"]  # keep the noise that a prediction implies, or add fresh noise

    # Diversity: the first steps, which follow the teacher
    anchored_steps: CountOrZero  # number of first steps trained with L_div; 1 in the paper
    diversity_weight: NonNegativeFloat  # lambda of eq. 8
    stop_gradient: bool  # block the gradient of L_DMD from the anchored steps
    target: Literal["secant", "tangent"]  # x0 that leads to the anchor in one step, or the teacher's x0 at the anchor
    space: Literal["x0", "v", "eps"]  # space in which L_div squares the error, see `diversity_loss`

    # Quality: the remaining steps, which match the teacher's distribution
    # Noise shares (sigma for flow models) between which L_DMD's teacher is guided (arXiv:2404.07724); [0, 1]: all
    guidance_interval: Annotated[tuple[Share, Share], Field(strict=False)]
    normalizer: Literal["noisy", "x0"]  # scale of L_DMD's gradient, see `dmd_loss`
    graded_steps: Literal["all", "last", "random"]  # remaining steps that L_DMD trains in one update

    # The fake score
    fake_score_turns: Few  # fake-score updates per cycle
    fake_score_warmup: CountOrZero  # further fake-score updates before the first cycle
    fake_rollout: Literal["fresh", "shared"]  # student samples for each of these updates, or once per cycle for all

    # Optimizers and measurements
    student: OptimizerRecipe  # of the student
    fake_score: OptimizerRecipe  # of the fake score
    watch: WatchRecipe  # of the student while it trains; only keep=best changes the student

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.anchored_steps >= self.num_steps:
            raise ValueError(f"anchored_steps={self.anchored_steps} must be below num_steps={self.num_steps}")
        if self.anchored_steps == 0 and (self.diversity_weight > 0 or self.stop_gradient):
            raise ValueError("anchored_steps=0 is vanilla DMD: set diversity_weight=0 and stop_gradient=false with it")
        if self.graded_steps != "all" and self.anchored_steps and not self.stop_gradient:
            raise ValueError(
                f"graded_steps={self.graded_steps} sends no gradient into the anchored steps: "
                "set stop_gradient=true with it"
            )
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise ValueError(f"guidance_interval={list(self.guidance_interval)} must rise; [0.0, 1.0] is every level")
        if self.watch.keep == "best" and self.ema:
            raise ValueError(f"watch.keep=best keeps one cycle's weights, ema={self.ema} averages many: set ema=0.0")
        if isinstance(self.grid, list):
            if len(self.grid) != self.num_steps:
                raise ValueError(f"grid has {len(self.grid)} levels, num_steps={self.num_steps} needs as many")
            if any(a <= b for a, b in zip(self.grid, [*self.grid[1:], 0.0], strict=True)):
                raise ValueError(f"grid={self.grid} must fall strictly and stay above 0")
        return self
