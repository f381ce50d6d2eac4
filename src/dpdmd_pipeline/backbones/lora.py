"""Low-rank adapters as tensors: their three key formats in files, and their sum with a network's weights.

A module's weight is W + (alpha / rank) B A (arXiv:2106.09685). peft calls A and B ``lora_A`` and ``lora_B``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from dpdmd_pipeline.limits import first_names

A, B = ".lora_A.weight", ".lora_B.weight"
_KOHYA = "lora_unet_"
_KOHYA_ENDINGS = {A: ".lora_down.weight", B: ".lora_up.weight"}
_PEFT_ENDINGS = {kohya: peft for peft, kohya in _KOHYA_ENDINGS.items()}


def check_lora(state: Mapping[str, Tensor], rank: int) -> None:
    """Hold an adapter against its rank: it has peft's keys, and both factors of every module."""
    modules = {name.removesuffix(A).removesuffix(B) for name in state}
    unpaired = sorted(state.keys() ^ {module + ending for module in modules for ending in (A, B)})
    if unpaired or not state:
        keys = first_names(unpaired) or "no keys"
        raise ValueError(f"this is not a LoRA of pairs <module>{A} and <module>{B}: {keys}")
    for name in sorted(state):
        stored_rank = state[name].shape[0 if name.endswith(A) else 1]  # A is [rank, in, ...], B [out, rank, ...]
        if stored_rank != rank:
            raise ValueError(f"dpdmd.lora_rank is {rank}, but {name} has rank {stored_rank}")


def modules_of(state: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that an adapter with peft's keys changes."""
    return sorted(name.removesuffix(A) for name in state if name.endswith(A))


def change_of(state: Mapping[str, Tensor], module: str) -> Tensor:
    """B A of one module in float32, in the shape of its weight."""
    down, up = state[module + A].float(), state[module + B].float()
    return (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])


@torch.no_grad()
def add_lora(weights: MutableMapping[str, Tensor], state: Mapping[str, Tensor], scale: float) -> None:
    """Add scale (alpha / rank) times an adapter with peft's keys to weights, in place; sums are formed in float32."""
    remedy, modules = "give the teacher that it was trained on", modules_of(state)
    if unknown := [name for name in modules if f"{name}.weight" not in weights]:
        count = f"{len(unknown)} of {len(modules)} modules"
        raise ValueError(f"{count} of the LoRA are not in the network ({first_names(unknown)}): {remedy}")
    for name in modules:
        weight, change = weights[f"{name}.weight"], change_of(state, name)
        if change.shape != weight.shape:
            shapes = f"{list(change.shape)} in the LoRA, {list(weight.shape)} in the network"
            raise ValueError(f"{name} has shape {shapes}: {remedy}")
        weight.copy_(weight.float() + scale * change.to(weight.device))


def transformer_from_peft(state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Convert to the keys that diffusers and ComfyUI read for transformers (SD3): prefix ``transformer.``.

    The format has no alpha, and readers assume alpha = rank: the scale is multiplied into B.
    """
    return {
        f"transformer.{name}": scale * value.float() if name.endswith(B) else value for name, value in state.items()
    }


def kohya_from_peft(state: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Convert to the keys that diffusers and ComfyUI read for UNets (SDXL): one word per module, and its alpha.

    ComfyUI reads only a part of diffusers' own ``unet.`` keys, without a warning.
    """
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        ending = A if name.endswith(A) else B
        word = _kohya_word(name.removesuffix(ending))
        tensors[word + _KOHYA_ENDINGS[ending]] = value
        tensors[f"{word}.alpha"] = torch.tensor(float(alpha))
    return tensors


def peft_from_file(tensors: Mapping[str, Tensor], modules: Iterable[str]) -> dict[str, Tensor]:
    """Convert any of the three formats to peft's keys; unknown keys stay, for `check_lora` to report.

    Kohya's keys need the names of the network's modules.
    """
    words = {_kohya_word(module): module for module in modules}
    state = {}
    for name, value in tensors.items():
        word, dot, ending = name.partition(".")
        if word in words and ending == "alpha":
            continue  # the header has it
        if word in words and dot + ending in _PEFT_ENDINGS:
            name = words[word] + _PEFT_ENDINGS[dot + ending]
        state[name.removeprefix("transformer.")] = value
    return state


def _kohya_word(module: str) -> str:
    return _KOHYA + module.replace(".", "_")
