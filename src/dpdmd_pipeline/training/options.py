"""Options of the train stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import PositiveInt, model_validator

from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.training.recipe import Recipe


class TrainLaunchOptions(LaunchOptions):
    """The processes of a student, and whether each of them holds all of it."""

    sharding: Literal["none", "fsdp2"]  # fsdp2 cuts student and fake score over the processes; none: each holds them

    @model_validator(mode="after")
    def _cuts_something(self) -> Self:
        if self.sharding != "none" and self.total == 1:
            raise ValueError(f"sharding={self.sharding} cuts nothing in one process: set processes=2 or sharding=none")
        return self


class TrainOptions(Recipe):
    """A recipe and how it is carried out; what is named here does not change the student."""

    device: Literal["auto", "cpu", "cuda"]
    gradient_checkpointing: bool  # less memory, one more forward pass per graded one
    student_micro_batch: PositiveInt  # samples that one backward pass sees
    fake_score_micro_batch: PositiveInt
    # samples that the student draws at once for the fake score, of several turns if need be
    rollout_micro_batch: PositiveInt
    guidance_batch: Literal["joint", "apart"]  # a guided call's halves: one batch, or two of less memory
    compile: Literal["none", "blocks", "whole"]  # torch.compile of a network's repeated blocks, or of it all
    channels_last: bool  # the memory format of a UNet's convolutions; refused for transformers
    fused: bool  # AdamW's update in one kernel
    checkpoint_every: PositiveInt  # steps
    keep_last: PositiveInt  # checkpoints kept while training; a damaged one is passed over for the one before
    fetch_every: PositiveInt  # steps between fetches of the losses from the device
    ratio_every: PositiveInt  # steps between measurements of the two gradients' norms
    log_every: PositiveInt  # steps between lines in the log
    launch: TrainLaunchOptions

    @model_validator(mode="after")
    def _is_shared_evenly(self) -> Self:
        if self.batch_size % self.launch.total:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be shared evenly by {self.launch.total} processes "
                f"(launch: {self.launch.processes} on each of {self.launch.machines} machines)"
            )
        return self

    @model_validator(mode="after")
    def _can_be_compiled(self) -> Self:
        if self.compile == "whole" and self.roles == "lora" and self.gradient_checkpointing:
            raise ValueError(
                "compile=whole cannot see which adapter gradient_checkpointing repeats a pass under with roles=lora: "
                "set compile=blocks, or gradient_checkpointing=false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if self.launch.sharding == "none":
            return self
        for name, plain in (("weighting", "fixed"), ("compile", "none"), ("channels_last", False)):
            if (value := getattr(self, name)) != plain:
                raise ValueError(
                    f"{name}={value} does not go with launch.sharding={self.launch.sharding}: set {name}={plain}, or "
                    "launch.sharding=none"
                )
        if self.roles == "lora":
            raise ValueError("roles=lora cannot be sharded, its adapters are small: set launch.sharding=none")
        kinds = {role: getattr(self, role).kind for role in ("student", "fake_score")}
        if eight_bits := [role for role, kind in kinds.items() if kind == "adamw_8bit"]:
            raise ValueError(
                f"{eight_bits[0]}.kind=adamw_8bit cannot be sharded: set kind=adamw or launch.sharding=none"
            )
        return self

    def recipe(self) -> Recipe:
        """Only what decides the result."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))
