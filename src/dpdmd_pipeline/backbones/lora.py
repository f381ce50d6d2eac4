"""Low-rank adapters as tensors: their three spellings in files, and how they are added to a network's weights.

A module's weight is W + (alpha / rank) B A (arXiv:2106.09685). peft calls A and B ``lora_A`` and ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

_A, _B = ".lora_A.weight", ".lora_B.weight"
_KOHYA = "lora_unet_"
_KOHYA_ENDINGS = {_A: ".lora_down.weight", _B: ".lora_up.weight"}
_PEFT_ENDINGS = {theirs: ours for ours, theirs in _KOHYA_ENDINGS.items()}


def rank_of(name: str, tensor: Tensor) -> int:
    """Rank of one tensor of an adapter: A is [rank, in, ...], B is [out, rank, ...]."""
    return tensor.shape[0 if name.endswith(_A) else 1]


def check_lora(state: Mapping[str, Tensor], rank: int) -> None:
    """Hold an adapter in peft's spelling against its rank.

    Raises:
        ValueError: if there are other keys, a module has not both factors, or a factor is of another rank.
    """
    modules = {name.removesuffix(_A).removesuffix(_B) for name in state}
    strange = sorted(state.keys() ^ {module + ending for module in modules for ending in (_A, _B)})
    if strange or not state:
        raise ValueError(f"this is no LoRA of pairs <module>{_A} and <module>{_B}: {listed(strange)}")
    if wrong := sorted(name for name in state if rank_of(name, state[name]) != rank):
        raise ValueError(f"dpdmd.lora_rank is {rank}, but {wrong[0]} has rank {rank_of(wrong[0], state[wrong[0]])}")


@torch.no_grad()
def add_lora(weights: MutableMapping[str, Tensor], state: Mapping[str, Tensor], scale: float) -> None:
    """Add an adapter to weights, in place; each sum is formed in float32.

    Args:
        weights: of the network, by name.
        state: in peft's spelling, as `check_lora` accepts it.
        scale: alpha / rank.

    Raises:
        ValueError: naming the first three modules that the network has not, or has in another shape.
    """
    modules = sorted(name.removesuffix(_A) for name in state if name.endswith(_A))
    if strange := [name for name in modules if f"{name}.weight" not in weights]:
        raise ValueError(
            f"{len(strange)} of {len(modules)} modules of the LoRA are none of the network's ({listed(strange)}): "
            "give the teacher that it was trained on"
        )
    for name in modules:
        weight, down, up = weights[f"{name}.weight"], state[name + _A], state[name + _B]
        if (up.shape[0], *down.shape[1:]) != tuple(weight.shape):
            shapes = f"{[up.shape[0], *down.shape[1:]]}, the network's {list(weight.shape)}"
            raise ValueError(f"the LoRA's {name} is of shape {shapes}: give the teacher that it was trained on")
        change = (up.float().flatten(1) @ down.float().flatten(1)).view(weight.shape)
        weight.copy_(weight.float() + scale * change.to(weight.device))


def transformer_from_peft(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The spelling that diffusers and ComfyUI read for transformers (SD3): prefix ``transformer.``.

    It has no place for alpha, readers take alpha = rank: the scale goes into B.
    """
    return {
        f"transformer.{name}": scale * value.float() if name.endswith(_B) else value for name, value in state.items()
    }


def kohya_from_peft(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """The spelling that diffusers and ComfyUI read for UNets (SDXL): one word per module, and its alpha.

    ComfyUI reads diffusers' own ``unet.`` keys only in part, and does not say so.
    """
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        ending = _A if name.endswith(_A) else _B
        word = _kohya_word(name.removesuffix(ending))
        found[word + _KOHYA_ENDINGS[ending]] = value
        found[f"{word}.alpha"] = torch.tensor(float(alpha))
    return found


def peft_from_file(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """Back from either spelling, or from peft's own; keys it does not know stay, for `check_lora` to name.

    Args:
        tensors: of a LoRA file.
        modules: names of the network's modules; kohya's spelling cannot be undone without.
    """
    words = {_kohya_word(module): module for module in modules}
    found = {}
    for name, value in tensors.items():
        word, dot, ending = name.partition(".")
        if word in words and ending == "alpha":
            continue  # the header tells it
        if word in words and dot + ending in _PEFT_ENDINGS:
            name = words[word] + _PEFT_ENDINGS[dot + ending]
        found[name.removeprefix("transformer.")] = value
    return found


def _kohya_word(module: str) -> str:
    return _KOHYA + module.replace(".", "_")


def listed(names: list[str]) -> str:
    """The first three of many names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "") if names else "none"
