"""Teacher, student and fake score: three networks, or one frozen base with two LoRA adapters."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpdmd_pipeline.backbones.base import Backbone
from dpdmd_pipeline.backbones.lora import A, B
from dpdmd_pipeline.backbones.start import Start
from dpdmd_pipeline.limits import first_names
from dpdmd_pipeline.training.recipe import LoraRecipe, Precision, Recipe
from dpdmd_pipeline.training.sharding import shard

if TYPE_CHECKING:
    from peft.tuners.tuners_utils import BaseTunerLayer


@dataclass(frozen=True)
class Roles:
    """The three networks of one family, with its call signature; the teacher is frozen."""

    teacher: nn.Module
    student: nn.Module
    fake_score: nn.Module

    @property
    def networks(self) -> list[nn.Module]:
        """diffusers' networks behind the roles: three, or one with its adapters."""
        roles = self.teacher, self.student, self.fake_score
        return list(dict.fromkeys(role._shared[0] if isinstance(role, AdapterView) else role for role in roles))


def make_roles(
    backbone: Backbone,
    recipe: Recipe,
    *,
    gradient_checkpointing: bool,
    sharded: bool,
    start: Start | None = None,
    of_teacher: Backbone | None = None,
) -> Roles:
    """Load the networks of a recipe; full ones `sharded` over the processes, which must have joined a group.

    From `start` the student begins, and by the recipe the fake score too: it must know the student's distribution, and
    one that still believes in the teacher's sees no difference to it in what the student has lost. `of_teacher` loads
    the teacher in a dtype of its own; adapters share their base, of `backbone`.
    """
    starts = {"student": start, "fake_score": start if recipe.fake_score_from == "start" else None}
    if recipe.roles == "full":
        return full_roles(
            backbone,
            gradient_checkpointing=gradient_checkpointing,
            shard_in=recipe.precision if sharded else None,
            starts=starts,
            of_teacher=of_teacher,
        )
    roles = lora_roles(backbone, recipe.lora, seed=recipe.seed, gradient_checkpointing=gradient_checkpointing)
    for name, start in starts.items():
        if start is not None:
            start_adapter(getattr(roles, name), start, recipe.lora.alpha_per_rank)
    return roles


def full_roles(
    backbone: Backbone,
    *,
    gradient_checkpointing: bool,
    shard_in: Precision | None = None,
    starts: Mapping[str, Start | None] = MappingProxyType({}),
    of_teacher: Backbone | None = None,
) -> Roles:
    """Three networks that start as the teacher, or as `starts` says; the trained ones have float32 weights.

    With `shard_in` each is sharded right after loading, for arithmetic of this precision.
    """
    teacher = (of_teacher or backbone).load_model().requires_grad_(False).eval()
    trained = []
    for role in ("student", "fake_score"):
        network = backbone.load_model(float32=True)
        if start := starts.get(role):
            start.load_into(network)
        if shard_in:
            shard(network, shard_in)
        if gradient_checkpointing:
            network.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False))
        trained.append(network)
    return Roles(teacher, *trained)


def lora_roles(backbone: Backbone, recipe: LoraRecipe, *, seed: int, gradient_checkpointing: bool) -> Roles:
    """One frozen base: the teacher is the base alone, student and fake score are the base with an adapter each.

    Half of an adapter is random by `seed`; the other half is zero, so all roles start as the teacher.

    Raises:
        ValueError: if `targets` match no layer of the network.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = backbone.load_model(weights=recipe.base_weights)
    unused = {name.rpartition(".")[0] for name, weight in base.named_parameters() if not weight.requires_grad}
    base.requires_grad_(False).eval()
    ranks = {"student": recipe.student_rank, "fake_score": recipe.fake_score_rank}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, rank in ranks.items():
            config = LoraConfig(
                r=rank,
                lora_alpha=rank * recipe.alpha_per_rank,
                target_modules=recipe.targets,
                init_lora_weights="gaussian",
            )
            try:
                with warnings.catch_warnings():  # the second adapter is intended
                    warnings.filterwarnings("ignore", "Already found a `peft_config`")
                    warnings.filterwarnings("ignore", "TorchaoLoraLinear was instantiated")  # nothing is merged
                    inject_adapter_in_model(config, base, adapter_name=name)
            except ValueError as error:
                raise ValueError(f"train.lora.targets={recipe.targets}: {error}") from error
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    if gradient_checkpointing:
        base.enable_gradient_checkpointing(partial(_checkpoint_under_its_adapter, layers))
    roles = Roles(AdapterView(base, layers, None), *(AdapterView(base, layers, name) for name in ranks))
    for name, weight in base.named_parameters():
        if name.partition(".lora_")[0] in unused:
            weight.requires_grad_(False)
    return roles


@torch.no_grad()
def start_adapter(view: AdapterView, start: Start, scale: float) -> None:
    """Write a LoRA of at most the adapter's rank into it; the rows of a larger rank stay random, times zero.

    Raises:
        ValueError: if the adapter has no room for it.
    """
    state = view.adapter_state()
    check_room(start, state, f"lora.{view.adapter}_rank")
    for name, value in start.adapter.items():
        if name.endswith(A):
            state[name][: len(value)] = value.to(state[name])
        else:
            state[name][:, : value.shape[1]] = value.to(state[name]) / scale


def check_room(start: Start, state: Mapping[str, Tensor], option: str) -> None:
    """Hold a start against an adapter, given by its state and the option of its rank; ValueError if it does not fit."""
    if start.adapter is None:
        raise ValueError(f"start_from={start.file} has whole weights, not a LoRA: set roles=full with it")
    if others := sorted(start.adapter.keys() - state.keys()):
        modules = sorted({name.removesuffix(A).removesuffix(B) for name in others})
        raise ValueError(f"start_from={start.file} changes {first_names(modules)}: add them to lora.targets")
    rank = max(len(value) for name, value in start.adapter.items() if name.endswith(A))
    if rank > (available := len(next(value for name, value in state.items() if name.endswith(A)))):
        raise ValueError(f"start_from={start.file} has rank {rank}, {option} is {available}: set it to {rank} or more")


class AdapterView(nn.Module):
    """A shared base with adapted layers, under one adapter or none; its parameters are only those of the adapter."""

    def __init__(self, base: nn.Module, layers: list[BaseTunerLayer], adapter: str | None) -> None:
        super().__init__()
        self._shared = (base, layers)  # in a tuple, so not a submodule: three views would hold it three times
        self.adapter = adapter
        named = [] if adapter is None else [(n, p) for n, p in base.named_parameters() if f".{adapter}." in n]
        self.names = [name.replace(f".{adapter}.", ".") for name, _ in named]
        for _, parameter in named:
            parameter.data = parameter.data.float()  # master weights, whatever the base's precision
        self.weights = nn.ParameterList(parameter.requires_grad_(True) for _, parameter in named)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base, layers = self._shared
        _activate(layers, self.adapter)
        return base(*args, **kwargs)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapter's weights by their names in the network, as peft writes them."""
        return dict(zip(self.names, self.weights, strict=True))


def _activate(layers: list[BaseTunerLayer], adapter: str | None) -> None:
    """Switch all adapted layers; peft's own `set_adapter` also freezes the other adapter's weights (decision 0005)."""
    for layer in layers:
        layer._disable_adapters = adapter is None
        layer._active_adapter = [] if adapter is None else [adapter]


def _active(layers: list[BaseTunerLayer]) -> str | None:
    return layers[0]._active_adapter[0] if layers[0]._active_adapter else None


class _ActiveAdapter:
    """Activate an adapter for a while; may be entered again, since two backward passes may go through one graph."""

    def __init__(self, layers: list[BaseTunerLayer], adapter: str | None) -> None:
        self.layers, self.adapter = layers, adapter

    def __enter__(self) -> None:
        self.before = _active(self.layers)
        _activate(self.layers, self.adapter)

    def __exit__(self, *_: object) -> None:
        _activate(self.layers, self.before)


def _checkpoint_under_its_adapter(layers: list[BaseTunerLayer], function: Any, *args: Any) -> Any:
    """Repeat the forward pass under its own adapter, not under the one that is active in the backward pass."""
    recompute = _ActiveAdapter(layers, _active(layers))
    return checkpoint(function, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), recompute))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
