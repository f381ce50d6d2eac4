"""Options of the train stage."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from dpdmd_pipeline.training.execution import Execution
from dpdmd_pipeline.training.recipe import Recipe


class TrainOptions(Execution, Recipe):
    """A recipe and its execution in one flat group."""

    @model_validator(mode="after")
    def _batch_is_shared_evenly(self) -> Self:
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
                "compile=whole with roles=lora cannot see the adapter under which gradient_checkpointing repeats a "
                "pass: set compile=blocks, or gradient_checkpointing=false"
            )
        return self

    @model_validator(mode="after")
    def _can_be_sharded(self) -> Self:
        if not self.sharded:
            return self
        for name, default in (("compile", "none"), ("channels_last", False)):
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name}={value} does not work with launch.sharding={self.launch.sharding}: set {name}={default}, "
                    "or launch.sharding=none"
                )
        if self.roles == "lora":
            raise ValueError("roles=lora cannot be sharded, its adapters are small: set launch.sharding=none")
        for role in ("student", "fake_score"):
            if getattr(self, role).kind == "adamw_8bit":
                raise ValueError(f"{role}.kind=adamw_8bit cannot be sharded: set kind=adamw or launch.sharding=none")
        return self

    def recipe(self) -> Recipe:
        """The options that decide the student."""
        return Recipe(**self.model_dump(include=set(Recipe.model_fields)))

    def execution(self) -> Execution:
        """The options of speed and memory."""
        return Execution(**self.model_dump(include=set(Execution.model_fields)))
