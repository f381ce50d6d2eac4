"""Options of the train stage: a recipe, and its execution, which changes speed and memory only."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainSerializer, PositiveFloat, WrapValidator, model_validator

from dpdmd_pipeline.bounds import Count, CountOrZero, Few, Size, StrictModel
from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe

Tracker = Literal["tensorboard", "wandb", "mlflow", "dvclive", "trackio"]  # of accelerate
MICRO_BATCHES = ("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")
_WITHOUT_GPU = 32  # samples of a micro-batch of `auto` that no GPU's memory limits


def _size_or_auto(value: Any, check: Any) -> Any:
    return value if value == "auto" else check(value)


# auto: the largest that fits on the GPU, see `planning.gpu.with_micro_batches`
MicroBatch = Annotated[Size, WrapValidator(_size_or_auto), PlainSerializer(lambda value: value)]


class TrainLaunchOptions(LaunchOptions):
    """Processes that share a student's training."""

    sharding: Literal["none", "fsdp2"]  # each process holds student and fake score whole, or only its shard of them

    @model_validator(mode="after")
    def _has_processes_to_shard_over(self) -> Self:
        if self.sharding != "none" and self.total == 1:
            raise ValueError(f"sharding={self.sharding} cuts nothing in one process: set processes=2 or sharding=none")
        return self


class Execution(StrictModel):
    """Speed and memory of one training run."""

    device: Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is a GPU
    launch: TrainLaunchOptions  # processes that share each batch

    # Memory
    card_gib: Annotated[float, Field(gt=0, le=100_000)] | None  # GPU memory to plan for; null: what the GPU has free
    gradient_checkpointing: bool  # less memory, one more forward pass per graded one
    student_micro_batch: MicroBatch  # samples that one backward pass of the student sees; gradients add up
    fake_score_micro_batch: MicroBatch  # the same for the fake score
    # Samples that the student draws at once for the fake score. Its weights are fixed during all fake-score updates of
    # a cycle, so this may be more than one batch.
    rollout_micro_batch: MicroBatch
    guidance_batch: Literal["joint", "apart"]  # both halves of a guided call in one batch, or one after the other

    # Speed
    compile: Literal["none", "blocks", "whole"]  # torch.compile of a network's repeated blocks, or of all of it
    channels_last: bool  # memory format of a UNet's convolutions; refused for transformers
    fused: bool  # AdamW's update in one kernel

    # Checkpoints and records
    checkpoint_every: Count  # cycles between checkpoints
    checkpoint_minutes: PositiveFloat  # minutes between checkpoints, if so many cycles take longer
    checkpoint_background: bool  # training goes on while one is written, from a copy in host memory
    keep_last: Few  # checkpoints on the disk while training; a damaged one is skipped for the one before
    ratio_every: CountOrZero  # cycles between comparisons of both losses' gradient norms; 0: none
    log_every: Count  # cycles between lines in the log
    previews: CountOrZero  # first prompts of the watch whose pictures are kept
    track: list[Tracker]  # programs that get losses and pictures while training; nothing is sent without them

    @property
    def sharded(self) -> bool:
        """True if each process holds only its shard of student and fake score."""
        return self.launch.sharding != "none"

    @property
    def shards(self) -> int:
        """Shards of each trained network."""
        return self.launch.total if self.sharded else 1

    @property
    def is_automatic(self) -> bool:
        """True if a micro-batch is to be chosen by the GPU's memory."""
        return any(getattr(self, name) == "auto" for name in MICRO_BATCHES)

    def fitted_to(self, batch_size: int) -> Execution:
        """The same without `auto`, and without micro-batches larger than a process's share of the batch."""
        share = batch_size // self.launch.total
        sizes = {name: getattr(self, name) for name in MICRO_BATCHES}
        sizes = {name: _WITHOUT_GPU if size == "auto" else size for name, size in sizes.items()}
        trained = {name: min(share, sizes[name]) for name in MICRO_BATCHES[:2]}
        return self.model_copy(update=sizes | trained)


class OptimizerOptions(OptimizerRecipe):
    """AdamW for one network, whole or as an adapter: the best learning rates of the two differ by about ten."""

    lora_learning_rate: PositiveFloat  # replaces learning_rate if roles=lora


class TrainOptions(Execution, Recipe):
    """A recipe and its execution in one flat group."""

    student: OptimizerOptions
    fake_score: OptimizerOptions

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        if self.batch_size % self.launch.total:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared evenly by {self.launch.total} processes "
                f"(launch: {self.launch.processes} on each of {self.launch.machines} machines)"
            )
        if self.compile == "whole" and self.roles == "lora" and self.gradient_checkpointing:
            raise ValueError(
                "compile=whole with roles=lora cannot see the adapter under which gradient_checkpointing repeats a "
                "pass: set compile=blocks, or gradient_checkpointing=false"
            )
        if self.lora.base_weights != "as_teacher":
            self._check_base_weights()
        if self.sharded:
            self._check_sharding()
        return self

    def _check_base_weights(self) -> None:
        for name, needed in (("roles", "lora"), ("compile", "none")):
            if (value := getattr(self, name)) != needed:
                raise ValueError(
                    f"lora.base_weights={self.lora.base_weights} does not work with {name}={value}: "
                    f"set {name}={needed}, or base_weights=as_teacher"
                )

    def _check_sharding(self) -> None:
        for name, default in (("compile", "none"), ("channels_last", False)):
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}={value} does not work with launch.sharding={self.launch.sharding}: set {name}={default}, "
                    "or launch.sharding=none"
                )
        if self.roles == "lora":
            raise ValueError("roles=lora cannot be sharded, its adapters are small: set launch.sharding=none")
        if self.launch.machines > 1 and self.is_automatic and self.card_gib is None:
            raise ValueError("micro-batches of auto may differ between machines, shards need the same: set card_gib")
        for role in ("student", "fake_score"):
            if getattr(self, role).kind == "adamw_8bit":
                raise ValueError(f"{role}.kind=adamw_8bit cannot be sharded: set kind=adamw or launch.sharding=none")

    def recipe(self) -> Recipe:
        """The options that decide the student; its optimizers have the learning rates of its roles."""
        options = self.model_dump(include=set(Recipe.model_fields))
        for optimizer in (options["student"], options["fake_score"]):
            lora_learning_rate = optimizer.pop("lora_learning_rate")
            if self.roles == "lora":
                optimizer["learning_rate"] = lora_learning_rate
        return Recipe(**options)

    def execution(self) -> Execution:
        """The options of speed and memory."""
        return Execution(**self.model_dump(include=set(Execution.model_fields)))
