"""State of a distillation: everything that changes while it runs and that a checkpoint holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpdmd_pipeline.training.checkpoint import Checkpoints, Writer, flat, load_part, new_tensor
from dpdmd_pipeline.training.roles import trainable
from dpdmd_pipeline.training.run import Run
from dpdmd_pipeline.training.sharding import is_sharded
from dpdmd_pipeline.training.watch import Watch

Record = dict[str, float]


@dataclass
class State:
    """Networks, optimizers, chosen weights and history; None for everything that the recipe does not ask for."""

    parts: dict[str, Any]  # networks and optimizers, by their names in a checkpoint
    average: AveragedModel | None  # of the student's weights
    best: nn.ParameterList | None  # the student's weights of the best cycle
    watch: Watch | None  # measurements
    history: list[Record] = field(default_factory=list)  # record of each finished cycle

    @classmethod
    def of(cls, run: Run) -> State:
        """State before the first cycle."""
        recipe, student = run.recipe, run.accelerator.unwrap_model(run.student.network)
        average = None
        if recipe.ema:  # of the trained weights alone: a view of a shared base would be copied with all of the base
            weights = nn.ParameterList(trainable(student))
            average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema))
        parts = {
            "student": student,
            "fake_score": run.accelerator.unwrap_model(run.fake_score.network),
            "student_optimizer": run.student.optimizer,
            "fake_score_optimizer": run.fake_score.optimizer,
        }
        return cls(
            parts=parts,
            average=average,
            best=copy_weights(student) if recipe.watch.keep == "best" else None,
            watch=Watch.of(recipe, run.data.prompts) if recipe.watch.every else None,
        )

    def stateful(self) -> dict[str, Any]:
        """Everything with a `state_dict`, by its name in a checkpoint."""
        optional = {"ema": self.average, "watch": self.watch, "best": self.best}
        return {**self.parts, **{name: part for name, part in optional.items() if part is not None}}


def make_writer(run: Run, checkpoints: Checkpoints) -> Writer:
    """Writer of a run's states. All processes write their shards; networks that each holds whole, the first one."""
    sharded = is_sharded(run.student.network)
    group = dist.new_group(backend="gloo") if sharded else None  # its own: the loop exchanges at the same time
    writes = sharded or run.accelerator.is_main_process
    return Writer(checkpoints, run.execution.checkpoint_background, group, writes)


def resume(state: State, checkpoints: Checkpoints) -> int:
    """Continue from the newest checkpoint, if there is one; returns the number of finished cycles."""
    parts = state.stateful()
    tensors = flat({name: part.state_dict() for name, part in parts.items() if isinstance(part, nn.Module)})
    optimizers = {name: part for name, part in parts.items() if isinstance(part, torch.optim.Optimizer)}
    weights = {name: [p for group in part.param_groups for p in group["params"]] for name, part in optimizers.items()}

    def target(name: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        if name in tensors:
            return tensors[name]
        part, _, number, *_ = name.split("/")  # "student_optimizer/state/17/exp_avg"
        weight = weights[part][int(number)]
        return torch.empty_like(weight, dtype=dtype) if size == weight.shape else new_tensor(name, size, dtype)

    loaded = checkpoints.load_latest(target)
    if loaded is None:
        return 0
    cycles, saved = loaded
    state.history = saved["history"]
    for name, part in parts.items():
        if name in saved and not isinstance(part, nn.Module):  # networks have been loaded in place
            load_part(part, saved[name])
    return cycles


def save(run: Run, state: State, writer: Writer, cycles: int, *, stopping: bool = False) -> None:
    """Write the state after `cycles` cycles; after the last one set the final weights and keep the student alone.

    All processes must call this: each holds a shard of a sharded network. With `stopping` no training follows.
    """
    finished = cycles == run.recipe.max_steps
    if finished:
        _set_final_weights(state)
    parts = {"student": state.parts["student"]} if finished else state.stateful()
    states = {name: part.state_dict() for name, part in parts.items()}
    writer.save(cycles, {"history": state.history, **states}, finished=finished, last=finished or stopping)


@torch.no_grad()
def _set_final_weights(state: State) -> None:
    """Put the average or the best cycle's weights into the student, if the recipe asks for either."""
    chosen: Sequence[nn.Parameter] | None = state.best if state.average is None else state.average.module
    if chosen is not None:
        for weight, final in zip(trainable(state.parts["student"]), chosen, strict=True):
            weight.copy_(final)


def copy_weights(student: nn.Module) -> nn.ParameterList:
    """A copy of the trained weights; each process copies its shards."""
    return nn.ParameterList(weight.detach().clone() for weight in trainable(student))
