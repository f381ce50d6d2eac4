"""Bytes that our loop and the published one hold, full and LoRA, and how near the estimate before a run comes.

Counted: every storage once; what autograd keeps is counted as it asks for it. On CUDA the allocator's peak as well.
SD3.5-Medium at 1024 pixels is counted from its configurations alone, wherever this runs.

    python benchmarks/bench_memory.py
    python benchmarks/bench_memory.py --env sd35 --config sd35_medium --device cuda
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from kedro.config import OmegaConfigLoader
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import timing
import workload
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.pipelines.train.preflight import memory_model
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.memory import RESERVED
from dpdmd_pipeline.training.roles import Roles, make_roles
from random_teacher import CONFIGS, make_weightless_teacher
from record import ROOT, record
from workload import Workload

MIB = 2**20
BATCHES = (1, 4)
FULL_SIZE = "sd35_medium"


class Held:
    """Bytes that autograd keeps, and their largest sum; parameters are not counted.

    Args:
        own: storages of the networks.
    """

    def __init__(self, own: set[int]) -> None:
        self.own, self.users, self.now, self.most = own, {}, 0, 0

    def pack(self, tensor: Tensor) -> _Box:
        box, storage = _Box(tensor), tensor.untyped_storage()
        name, size = storage.data_ptr(), storage.nbytes()
        if name not in self.own:
            self.users[name] = self.users.get(name, 0) + 1
            self.now += size if self.users[name] == 1 else 0
            self.most = max(self.most, self.now)
            weakref.finalize(box, self._free, name, size)
        return box

    def unpack(self, box: _Box) -> Tensor:
        return box.tensor

    def _free(self, name: int, size: int) -> None:
        self.users[name] -= 1
        self.now -= size if self.users[name] == 0 else 0


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Optimizers:
    """Bytes of gradients when an optimiser steps, at most, and of all optimisers' states."""

    def __init__(self) -> None:
        self.gradients, self.states = 0, {}

    @contextmanager
    def watched(self) -> Iterator[None]:
        handles = [
            register_optimizer_step_pre_hook(self._before),
            register_optimizer_step_post_hook(self._after),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        self.gradients = max(self.gradients, size(w.grad for w in weights if w.grad is not None))

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kept = chain.from_iterable(state.values() for state in optimizer.state.values())
        self.states[id(optimizer)] = size(value for value in kept if isinstance(value, Tensor))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def networks(roles: Roles) -> list[nn.Module]:
    """The three roles, and the base that adapters share."""
    held = [roles.teacher, roles.student, roles.fake_score]
    return [*held, *(role._shared[0] for role in held if hasattr(role, "_shared"))]


def main(asked: argparse.Namespace) -> None:
    """Every case by itself; what one holds is gone before the next."""
    logging.disable(logging.INFO)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(asked, Path(folder))
        for kind in [asked.roles] if asked.roles else ["full", "lora"]:
            for batch in BATCHES:
                measured |= _case(work, kind, batch)
        measured |= at_full_size(Path(folder) / FULL_SIZE)
    told = {
        "bytes are": "MiB; a sum is that of its parts' maxima, which need not come at one time",
        "the estimate": "has a second gradient, for train.ratio_every, and what a pass without gradient holds; "
        f"its {RESERVED / 2**30:g} GiB for CUDA itself are left out",
        "settings": work.settings(),
    }
    record(asked.result or "memory", {**measured, **told, **timing.conditions()})


def _case(work: Workload, kind: str, batch: int) -> dict[str, Any]:
    """Ours, the published loop and the estimate."""
    options = work.options(
        roles=kind, batch_size=batch, student_micro_batch=batch, fake_score_micro_batch=batch, rollout_micro_batch=batch
    )
    estimated = memory_model(work.teacher, work.backbone).estimate(options.recipe(), options.execution())
    parts = ("weights", "gradients", "optimizer", "activations")
    found = {
        "ours": ours(work, options),
        "published loop": published(work, options),
        "estimated": _told(**{part: getattr(estimated, part) for part in parts}),
    }
    sums = {which: parts["sum"] for which, parts in found.items()}
    name = f"{kind}, batch {batch}"
    return {
        **{f"{name}: {which}": parts for which, parts in found.items()},
        f"{name}: published loop / ours": sums["published loop"] / sums["ours"],
        f"{name}: estimated / ours": sums["estimated"] / sums["ours"],
    }


def ours(work: Workload, options: TrainOptions) -> dict[str, float]:
    """Our loop with warm caches."""
    roles, records = work.start(options)
    with closing(records):
        return _held(records.__next__, networks(roles), lambda: [])


def published(work: Workload, options: TrainOptions) -> dict[str, float]:
    """The published loop, which keeps text encoders and autoencoder."""
    family = work.backbone.load(work.teacher, options.device)
    roles = make_roles(family, options.recipe(), gradient_checkpointing=options.gradient_checkpointing, sharded=False)
    loop = work.reference(options, roles)

    def parts() -> list[nn.Module]:
        held = [loop.family._vae, *loop.family._text.components.values()]
        return [part for part in held if isinstance(part, nn.Module) and not _is_weightless(part)]

    return _held(loop.cycle, networks(roles), parts)


def _is_weightless(part: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in part.parameters())


def _held(cycle: Callable[[], object], held: list[nn.Module], parts: Callable[[], list[nn.Module]]) -> dict[str, float]:
    """Bytes in the second cycle, when all is loaded, and the GPU's peak over both."""
    gc.collect()
    if on_gpu := torch.cuda.is_available() and any(t.is_cuda for t in tensors_of(held)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizers = Optimizers()
    autograd = Held({tensor.untyped_storage().data_ptr() for tensor in tensors_of(held)})
    cycle()
    peak = {"CUDA peak": torch.cuda.max_memory_allocated() / MIB} if on_gpu else {}  # before hooks keep more alive
    with optimizers.watched(), torch.autograd.graph.saved_tensors_hooks(autograd.pack, autograd.unpack):
        cycle()
    return peak | _told(
        weights=size(tensors_of(held)),
        text_encoders_and_autoencoder=size(tensors_of(parts())),
        gradients=optimizers.gradients,
        optimizer=sum(optimizers.states.values()),
        activations=autograd.most,
    )


# ---- full size


def at_full_size(folder: Path) -> dict[str, Any]:
    """One picture at a time on one card: our adapters, and the published loop, which trains whole networks."""
    numbers = make_weightless_teacher(folder, CONFIGS[FULL_SIZE])
    adapters, whole = (_estimated(folder, env) for env in ("sd35_lora_16gb", "sd35"))
    besides = sum(numbers[name] for name in numbers if name != "transformer")
    # One gradient, not two: it compares no norms. All steps wait for one backward pass, and nothing is encoded before
    published_parts = {
        "weights": whole["weights"],
        "text_encoders_and_autoencoder": besides * torch.bfloat16.itemsize,
        "gradients": whole["gradients"] // 2,
        "optimizer": whole["optimizer"],
        "activations": whole["activations"],
    }
    ours_sum, published_sum = sum(adapters.values()), sum(published_parts.values())
    return {
        f"{FULL_SIZE}, batch 1, counted: ours, LoRA": _told(**adapters),
        f"{FULL_SIZE}, batch 1, counted: published loop, full": _told(**published_parts),
        f"{FULL_SIZE}, batch 1, counted: published loop, full / ours, LoRA": published_sum / ours_sum,
    }


def _estimated(teacher: Path, env: str) -> dict[str, int]:
    """Bytes by their kind, with an environment's own options, but one sample at a time."""
    parameters = OmegaConfigLoader(str(ROOT / "conf"), env=env, **CONFIG_LOADER_ARGS)["parameters"]
    backbone = BackboneOptions(**parameters["backbone"])
    one_sample = dict.fromkeys(("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch"), 1)
    options = TrainOptions(**parameters["train"] | one_sample)
    recipe = options.recipe()
    if recipe.roles == "full":  # the published loop goes back through both losses at once
        recipe = recipe.model_copy(update={"stop_gradient": False})
    found = memory_model(teacher, backbone).estimate(recipe, options.execution())
    return {part: getattr(found, part) for part in ("weights", "gradients", "optimizer", "activations")}


def _told(**parts: int) -> dict[str, float]:
    return {"sum": sum(parts.values()) / MIB, **{name: value / MIB for name, value in parts.items()}}


if __name__ == "__main__":
    main(workload.parser(__doc__).parse_args())
