"""Training cycles on fake tensors: the real loop at full size, on a machine without a GPU.

Fake tensors have shapes and devices, no numbers.

    peak_of_cycles      bytes: every storage counts from its operation to its end. torch's autograd needs a real GPU for
                        fake tensors of "cuda", so this runs on fake tensors of the CPU, with the operations of CUDA's
                        autocast list that the CPU's lacks
    walk_on_cuda        an error if an operation mixes devices: all forward passes on fake tensors of "cuda"

`bench_fake_cycle.py` runs them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.planning.weightless import autocast, move_to_fake, weightless
from dpdmd_pipeline.training import distill
from dpdmd_pipeline.training.anchors import OnlineAnchors, TeacherAnchors
from dpdmd_pipeline.training.draws import Draws
from dpdmd_pipeline.training.optimizer import make_optimizer
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import OptimizerRecipe
from dpdmd_pipeline.training.roles import make_roles, trainable
from dpdmd_pipeline.training.run import Run, Trained, TrainingData

BLOCK = 512  # bytes; the smallest of CUDA's allocator


class Meter(TorchDispatchMode):
    """Bytes of all storages, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # a check reads a number, which fake tensors lack
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        if (name := storage._cdata) not in self.sizes:
            self.sizes[name] = -(-storage.nbytes() // BLOCK) * BLOCK
            self.now += self.sizes[name]
            weakref.finalize(storage, self._remove, name)

    def _remove(self, name: int) -> None:
        self.now -= self.sizes.pop(name)


@contextmanager
def norms_in_float32() -> Iterator[None]:
    """Compute norms in float32 under autocast, as on CUDA."""

    def in_float32(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Tensor:
            if torch.is_autocast_enabled("cpu"):
                args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
            return function(*args, **kwargs)

        return call

    norms = {name: in_float32(getattr(F, name)) for name in ("layer_norm", "group_norm")}
    with mock.patch.multiple(F, **norms):
        yield


def peak_of_cycles(teacher: Path, backbone: BackboneOptions, options: TrainOptions, anchor_steps: Sequence[int]) -> int:
    """Peak bytes of one cycle of one process, after the first."""
    with fake_run(teacher, backbone, options, anchor_steps, "cpu") as (run, meter), norms_in_float32():
        give_moments(run)
        walk(run)
        return meter.peak


def walk_on_cuda(teacher: Path, backbone: BackboneOptions, options: TrainOptions, anchor_steps: Sequence[int]) -> None:
    """Run the forward passes of one cycle on fake tensors of "cuda"; raises an error if an operation mixes devices."""
    unmeasured = options.model_copy(update={"ratio_every": 0})  # there is no gradient
    with (
        mock.patch.object(torch, "autocast", lambda _, dtype, enabled: autocast("cuda") if enabled else nullcontext()),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        fake_run(teacher, backbone, unmeasured, anchor_steps, "cuda") as (run, _),
    ):
        run.accelerator.backward = lambda loss, **_: None
        for role in (run.student, run.fake_score):
            role.optimizer.step = role.optimizer.zero_grad = lambda **_: None
        walk(run)


def give_moments(run: Run) -> None:
    """Let the optimizers make their moments, as they do in the first cycle."""
    for role in (run.student, run.fake_score):
        for weight in trainable(role.network):
            weight.grad = torch.zeros_like(weight)
        role.update()


def walk(run: Run) -> None:
    """One cycle."""
    distill.update_fake_score(run, "fake_score", range(run.recipe.fake_score_turns))
    distill.update_student(run, 0)


@contextmanager
def fake_run(
    teacher: Path, backbone: BackboneOptions, options: TrainOptions, anchor_steps: Sequence[int], device: str
) -> Iterator[tuple[Run, Meter]]:
    recipe = options.recipe()
    family = weightless(backbone.load(teacher, "cpu"), teacher)
    schedules = family.schedule(backbone.num_steps), family.student_schedule(recipe.grid, recipe.num_steps)
    with torch.device("meta"):
        roles = make_roles(family, recipe, gradient_checkpointing=options.gradient_checkpointing, sharded=False)
    with FakeTensorMode(allow_non_fake_inputs=True), Meter() as meter:
        move_to_fake([roles.teacher, roles.student, roles.fake_score, *roles.networks], device)
        of_teacher, of_student = (like(schedule, device) for schedule in schedules)
        family.device = torch.device(device)
        family.schedule, family.student_schedule = lambda _: of_teacher, lambda *_: of_student
        yield make_run(family, roles, backbone, options, anchor_steps), meter


def like(level: NoiseLevel, device: str) -> NoiseLevel:
    values = level.alpha, level.sigma, level.timestep
    return NoiseLevel(*(torch.empty(value.shape, dtype=value.dtype, device=device) for value in values))


def make_run(family: Any, roles: Any, backbone: BackboneOptions, options: TrainOptions, anchor_steps: list[int]) -> Run:
    recipe, execution = options.recipe(), options.execution().fitted_to(options.batch_size)
    rows, anchored = Embeddings(family), recipe.anchored_steps
    anchors = TeacherAnchors(
        family,
        roles.teacher,
        rows,
        num_steps=backbone.num_steps,
        guidance_scale=backbone.guidance_scale,
        anchor_steps=anchor_steps,
        with_denoised=recipe.target == "tangent",
        guidance_batch=options.guidance_batch,
    )
    source, scale = OnlineAnchors(anchors, [0], seed=0, anchored_steps=anchored), backbone.guidance_scale
    return Run(
        backbone=family,
        teacher=roles.teacher,
        student=trained(roles.student, recipe.student, execution.fused),
        fake_score=trained(roles.fake_score, recipe.fake_score, execution.fused),
        data=TrainingData(rows, [0], source, anchors.anchor_levels[:anchored], anchors.levels, scale),
        recipe=recipe,
        execution=execution,
        accelerator=SimpleNamespace(
            device=family.device,
            num_processes=1,
            backward=torch.autograd.backward,
            no_sync=lambda _: nullcontext(),
            reduce=lambda value, reduction: value,
        ),
        draws=Draws(family, 0, [0], recipe.between_steps == "renoise", family.device),
        batch_indices=range(recipe.batch_size // options.launch.total),
        levels=family.student_schedule(recipe.grid, recipe.num_steps),
    )


def trained(network: Any, recipe: OptimizerRecipe, fused: bool) -> Trained:
    return Trained(network, make_optimizer(trainable(network), recipe, fused=fused), recipe.max_grad_norm)


class Embeddings:
    """Rows of embeddings on the CPU."""

    def __init__(self, family: Any) -> None:
        self.family = family

    def __len__(self) -> int:
        return 2

    def rows(self, indices: Sequence[int]) -> dict[str, Tensor]:
        shapes = self.family.conditioning_shapes().items()
        return {name: torch.empty(len(indices), *shape, dtype=self.family.dtype) for name, shape in shapes}
