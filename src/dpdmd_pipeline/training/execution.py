"""Execution of a recipe: every option that changes speed or memory only, and the student by rounding at most."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, PositiveInt, model_validator

from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.training.recipe import STRICT


class TrainLaunchOptions(LaunchOptions):
    """Processes that share a student's training."""

    sharding: Literal["none", "fsdp2"]  # each process holds student and fake score whole, or only its shard of them

    @model_validator(mode="after")
    def _has_processes_to_shard_over(self) -> Self:
        if self.sharding != "none" and self.total == 1:
            raise ValueError(f"sharding={self.sharding} cuts nothing in one process: set processes=2 or sharding=none")
        return self


class Execution(BaseModel):
    """Speed and memory of one training run."""

    model_config = STRICT

    device: Literal["auto", "cpu", "cuda"]  # auto: CUDA if there is a GPU
    launch: TrainLaunchOptions  # processes that share each batch

    # Memory
    gradient_checkpointing: bool  # less memory, one more forward pass per graded one
    student_micro_batch: PositiveInt  # samples that one backward pass of the student sees; gradients add up
    fake_score_micro_batch: PositiveInt  # the same for the fake score
    # Samples that the student draws at once for the fake score. Its weights are fixed during all fake-score updates of
    # a cycle, so this may be more than one batch.
    rollout_micro_batch: PositiveInt
    guidance_batch: Literal["joint", "apart"]  # both halves of a guided call in one batch, or one after the other

    # Speed
    compile: Literal["none", "blocks", "whole"]  # torch.compile of a network's repeated blocks, or of all of it
    channels_last: bool  # memory format of a UNet's convolutions; refused for transformers
    fused: bool  # AdamW's update in one kernel
    fetch_every: PositiveInt  # cycles between fetches of the losses; each fetch waits for the device

    # Checkpoints and records
    checkpoint_every: PositiveInt  # cycles between checkpoints
    keep_last: PositiveInt  # checkpoints on the disk while training; a damaged one is skipped for the one before
    ratio_every: PositiveInt  # cycles between comparisons of both losses' gradient norms, two more backward passes
    log_every: PositiveInt  # cycles between lines in the log

    @property
    def sharded(self) -> bool:
        """True if each process holds only its shard of student and fake score."""
        return self.launch.sharding != "none"

    @property
    def shards(self) -> int:
        """Shards of each trained network."""
        return self.launch.total if self.sharded else 1

    def fitted_to(self, batch_size: int) -> Execution:
        """The same without micro-batches larger than a process's share of the batch."""
        share = batch_size // self.launch.total
        sizes = {name: min(share, getattr(self, name)) for name in ("student_micro_batch", "fake_score_micro_batch")}
        return self.model_copy(update=sizes)
