"""Launchers (torchrun, accelerate launch, srun) and machines of a run, which starts its processes itself.

On each machine, the launcher's first process goes on and starts the others anew; the launcher's own others end at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dpdmd_pipeline.training.launch_options import LaunchOptions
from dpdmd_pipeline.wording import short

# accelerate reads these, and would wait for processes that have ended
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PMI_RANK", "PMI_SIZE")


class Launcher(NamedTuple):
    """Processes that a launcher has started, this one among them."""

    source: str  # what it has set
    local_rank: int
    processes: int  # on each machine
    machines: int

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launcher:
        """Read torchrun's variables, or those of a Slurm step; without any, this process is alone."""
        if "WORLD_SIZE" not in environment and "SLURM_STEP_NUM_TASKS" in environment:
            size, machines = (_number(environment, f"SLURM_STEP_NUM_{name}", 1) for name in ("TASKS", "NODES"))
            return cls(f"srun: {size} tasks", _number(environment, "SLURM_LOCALID", 0), size // machines, machines)
        size, processes = (_number(environment, name, 1) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return cls(f"WORLD_SIZE={size}", _number(environment, "LOCAL_RANK", 0), processes, size // processes)

    def refused(self, launches: Mapping[str, LaunchOptions]) -> str | None:
        """The line for a run without a stage that fits the launcher; None if there is one, or this process is alone."""

        def fits(processes: int, machines: int) -> bool:
            return self.processes in (1, processes) and self.machines in (1, machines)

        shapes = {group: (one.processes, one.machines) for group, one in launches.items()}
        if any(fits(*shape) for shape in [(1, 1), *shapes.values()]):
            return None
        shares = ", ".join(f"{group}.launch has {shape[0]} on {shape[1]}" for group, shape in shapes.items())
        return (
            f"{self.source}, {self.processes} processes on each of {self.machines} machines: no stage of this run has "
            f"as many ({shares}); add --params train.launch.processes={self.processes},train.launch.machines="
            f"{self.machines}, or start it once on each machine"
        )


def _number(environment: Mapping[str, str], name: str, least: int) -> int:
    """Value of a variable, `least` if it is not set; a ValueError for anything but a whole number from `least` on."""
    value = environment.get(name, str(least))
    if not value.isdecimal() or int(value) < least:
        raise ValueError(f"{name}={short(repr(value), 80)} in the environment is no number a launcher sets: unset it")
    return int(value)


def launches_of(pipeline: Any, catalog: Any) -> dict[str, LaunchOptions]:
    """The option `launch` of each stage of a run, by parameter group."""
    groups = sorted(name.partition(":")[2] for name in pipeline.inputs() if name.startswith("params:"))
    options = {group: catalog.get(f"params:{group}").load() for group in groups}
    return {group: stage.launch for group, stage in options.items() if hasattr(stage, "launch")}


def rendezvous_of(launches: Mapping[str, LaunchOptions]) -> tuple[str, int] | None:
    """Rendezvous and number of the machines of a run; None for one machine, a ValueError if stages disagree."""
    several = {group: (one.rendezvous, one.machines) for group, one in launches.items() if one.machines > 1}
    if len(set(several.values())) > 1:
        shares = ", ".join(f"{group}.launch: machines={n}, rendezvous={name}" for group, (name, n) in several.items())
        raise ValueError(f"the stages of a run must name the same machines and rendezvous: {shares}")
    return next(iter(several.values()), None)
