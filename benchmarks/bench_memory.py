"""Memory of our loop and of the published one, full and LoRA, and the error of the estimate before a run.

Every storage counts once; autograd's tensors count when it saves them. On CUDA the allocator's peak is added.
SD3.5-Medium at 1024 pixels is computed from its configurations alone, on any machine.

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
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import timing
import workload
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.memory import RESERVED, memory_model
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.roles import Roles, make_roles
from random_teacher import CONFIGS, make_weightless_teacher
from record import record
from workload import Workload, load_parameters

MIB = 2**20
BATCHES = (1, 4)
FULL_SIZE = "sd35_medium"
ESTIMATED_PARTS = ("weights", "gradients", "optimizer", "activations")


class Autograd:
    """Bytes of the tensors that autograd saves, now and at most, without the networks' own.

    Args:
        own: storages of the networks.
    """

    def __init__(self, own: set[int]) -> None:
        self.own, self.users, self.bytes, self.peak = own, {}, 0, 0

    def pack(self, tensor: Tensor) -> _Box:
        box, storage = _Box(tensor), tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.own:
            self.users[address] = self.users.get(address, 0) + 1
            self.bytes += size if self.users[address] == 1 else 0
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(box, self._free, address, size)
        return box

    def unpack(self, box: _Box) -> Tensor:
        return box.tensor

    def _free(self, address: int, size: int) -> None:
        self.users[address] -= 1
        self.bytes -= size if self.users[address] == 0 else 0


class _Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Optimizers:
    """Peak bytes of the gradients at an optimizer's step, and bytes of each optimizer's state."""

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
        values = chain.from_iterable(state.values() for state in optimizer.state.values())
        self.states[id(optimizer)] = size(value for value in values if isinstance(value, Tensor))


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of the tensors; each storage counts once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def tensors_of(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]


def networks(roles: Roles) -> list[nn.Module]:
    """The three roles, and the base that adapters share."""
    modules = [roles.teacher, roles.student, roles.fake_score]
    return [*modules, *(module._shared[0] for module in modules if hasattr(module, "_shared"))]


def main(args: argparse.Namespace) -> None:
    """Measure one case after the other; each frees its memory before the next."""
    logging.disable(logging.INFO)
    measured: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = workload.prepare(args, Path(folder))
        for kind in [args.roles] if args.roles else ["full", "lora"]:
            for batch in BATCHES:
                measured |= _case(work, kind, batch)
        measured |= at_full_size(Path(folder) / FULL_SIZE)
    about = {
        "bytes are": "MiB; a sum is that of its parts' maxima, which need not come at one time",
        "the estimate": "has the second gradient that torch sums up over the steps, and what a pass without gradient "
        f"holds; its {RESERVED / 2**30:g} GiB for CUDA itself are left out",
        "settings": work.settings(),
    }
    record(args.result or "memory", {**measured, **about, **timing.conditions()})


def _case(work: Workload, kind: str, batch: int) -> dict[str, Any]:
    """Ours, the published loop and the estimate."""
    options = work.options(
        roles=kind, batch_size=batch, student_micro_batch=batch, fake_score_micro_batch=batch, rollout_micro_batch=batch
    )
    estimate = memory_model(work.teacher, work.backbone).estimate(options.recipe(), options.execution())
    cases = {
        "ours": ours(work, options),
        "published loop": published(work, options),
        "estimated": _mebibytes(**{part: getattr(estimate, part) for part in ESTIMATED_PARTS}),
    }
    sums = {which: parts["sum"] for which, parts in cases.items()}
    name = f"{kind}, batch {batch}"
    return {
        **{f"{name}: {which}": parts for which, parts in cases.items()},
        f"{name}: published loop / ours": sums["published loop"] / sums["ours"],
        f"{name}: estimated / ours": sums["estimated"] / sums["ours"],
    }


def ours(work: Workload, options: TrainOptions) -> dict[str, float]:
    """Memory of our loop with warm caches."""
    roles, records = work.start(options)
    with closing(records):
        return _measure(records.__next__, networks(roles), lambda: [])


def published(work: Workload, options: TrainOptions) -> dict[str, float]:
    """Memory of the published loop, which keeps text encoders and autoencoder loaded."""
    family = work.backbone.load(work.teacher, options.device)
    roles = make_roles(family, options.recipe(), gradient_checkpointing=options.gradient_checkpointing, sharded=False)
    loop = work.reference(options, roles)

    def others() -> list[nn.Module]:
        parts = [loop.family._vae, *loop.family._text.components.values()]
        return [part for part in parts if isinstance(part, nn.Module) and not _is_weightless(part)]

    return _measure(loop.cycle, networks(roles), others)


def _is_weightless(part: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in part.parameters())


def _measure(
    cycle: Callable[[], object], trained: list[nn.Module], others: Callable[[], list[nn.Module]]
) -> dict[str, float]:
    """Memory in the second cycle, when everything is loaded; on a GPU also the first cycle's peak.

    Args:
        cycle: runs one cycle.
        trained: the networks of the three roles.
        others: text encoders and autoencoder, once loaded.
    """
    gc.collect()
    if on_gpu := torch.cuda.is_available() and any(t.is_cuda for t in tensors_of(trained)):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    optimizers = Optimizers()
    autograd = Autograd({tensor.untyped_storage().data_ptr() for tensor in tensors_of(trained)})
    cycle()
    peak = (
        {"CUDA peak": torch.cuda.max_memory_allocated() / MIB} if on_gpu else {}
    )  # before the hooks, which keep more alive
    with optimizers.watched(), torch.autograd.graph.saved_tensors_hooks(autograd.pack, autograd.unpack):
        cycle()
    return peak | _mebibytes(
        weights=size(tensors_of(trained)),
        text_encoders_and_autoencoder=size(tensors_of(others())),
        gradients=optimizers.gradients,
        optimizer=sum(optimizers.states.values()),
        activations=autograd.peak,
    )


# ---- full size


def at_full_size(folder: Path) -> dict[str, Any]:
    """Estimate batch 1 on one card: our adapters, and the published loop, which trains whole networks."""
    numbers = make_weightless_teacher(folder, CONFIGS[FULL_SIZE])
    adapters, whole = (_estimated(folder, env) for env in ("sd35_lora_16gb", "sd35"))
    frozen_parts = sum(numbers[name] for name in numbers if name != "transformer")
    # It has one gradient, not two: all steps share one backward pass, and it adds to no other. Nothing is cached
    published_parts = {
        "weights": whole["weights"],
        "text_encoders_and_autoencoder": frozen_parts * torch.bfloat16.itemsize,
        "gradients": whole["gradients"] // 2,
        "optimizer": whole["optimizer"],
        "activations": whole["activations"],
    }
    ours_sum, published_sum = sum(adapters.values()), sum(published_parts.values())
    return {
        f"{FULL_SIZE}, batch 1, counted: ours, LoRA": _mebibytes(**adapters),
        f"{FULL_SIZE}, batch 1, counted: published loop, full": _mebibytes(**published_parts),
        f"{FULL_SIZE}, batch 1, counted: published loop, full / ours, LoRA": published_sum / ours_sum,
    }


def _estimated(teacher: Path, env: str) -> dict[str, int]:
    """Bytes by kind, with an environment's own options, but one sample at a time."""
    parameters = load_parameters(env)
    backbone = BackboneOptions(**parameters["backbone"])
    one_sample = dict.fromkeys(("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch"), 1)
    options = TrainOptions(**parameters["train"] | one_sample)
    recipe = options.recipe()
    if recipe.roles == "full":  # the published loop has one backward pass for both losses
        recipe = recipe.model_copy(update={"stop_gradient": False})
    estimate = memory_model(teacher, backbone).estimate(recipe, options.execution())
    return {part: getattr(estimate, part) for part in ESTIMATED_PARTS}


def _mebibytes(**parts: int) -> dict[str, float]:
    return {"sum": sum(parts.values()) / MIB, **{name: value / MIB for name, value in parts.items()}}


if __name__ == "__main__":
    main(workload.parser(__doc__).parse_args())
