"""Number of processes that share a stage; checked without loading torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

from pydantic import Field, model_validator

from dpdmd_pipeline.backbones.options import Device, resolve_device
from dpdmd_pipeline.bounds import Few, StrictModel


class LaunchOptions(StrictModel):
    """Processes that share the batch of an update, or the shards of a cache.

    A student is the same but for rounding; a cache is the same to the bit on a CPU.
    """

    processes: Few  # on each machine; with CUDA, one per GPU
    machines: Few  # the same command on each, at the same time, over one shared file system
    rendezvous: str | None = Field(pattern=r"^[^:\s]+:\d{1,5}$")  # host:port of the first machine; null on a single one

    @property
    def total(self) -> int:
        """Processes over all machines."""
        return self.processes * self.machines

    @model_validator(mode="after")
    def _machines_can_meet(self) -> Self:
        if self.machines > 1 and self.rendezvous is None:
            raise ValueError(f"machines={self.machines} need a rendezvous: host:port of one that all can reach")
        return self

    def of_shards(self, run: str, device: Device) -> Callable[..., Any] | None:
        """Launcher of these processes for work on shards; None for a single process.

        Each process has as many threads as a single one: another number would sum in another order. `run` names the
        run, the same on every machine.
        """
        if self.total == 1:
            return None
        from dpdmd_pipeline.training.launch import Launch, launched

        cuda = resolve_device(device).type == "cuda"
        launch = Launch(self.processes, self.machines, self.rendezvous, run, cuda, share_cores=False)
        return partial(launched, launch=launch)
