"""The tensors of a LoRA student: its keys in every usual spelling, its alphas, its fit to a base model."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .header import StudentHeader
from .limits import MAX_DEPTH, shorten
from .weights import first_three

_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
_WRAPPERS = ("base_model.model.", "transformer.", "unet.")
_COMFYUI_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model.")
_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def is_lora(keys: Iterable[str]) -> bool:
    """True if any key is a factor of a LoRA."""
    return any(_KEY.fullmatch(key) and not key.endswith(".alpha") for key in keys)


def lora_modules(state: Mapping[str, Tensor], family: str, name: str) -> dict[str, dict[str, Tensor]]:
    """Group a LoRA's tensors by module, in the spelling that ComfyUI reads for the family.

    ComfyUI itself skips unknown keys and reports them only in its log.

    Args:
        state: keys as in the file.
        family: of the base model.
        name: of the file, for messages.

    Returns:
        {module: {"lora_down": [rank, in, ...], "lora_up": [out, rank, ...], "alpha": []}}; alpha if the file has it.

    Raises:
        ValueError: for a key that is no part of a LoRA, a factor that is no matrix, or a module without one of its two
            factors.
    """
    if strange := sorted(key for key in state if not _KEY.fullmatch(key)):
        raise ValueError(f"{name} has {len(strange)} keys of no LoRA ({first_three(strange)}): export it again")
    factors = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    if flat := sorted(key for key, value in factors.items() if value.ndim < 2 or value.numel() == 0):
        raise ValueError(f"{name} has {len(flat)} factors that are no matrices ({first_three(flat)}): export it again")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        part = match["alpha"] or _FACTORS.get(match["factor"], match["factor"])
        modules.setdefault(_module_name(match["module"], family), {})[part] = tensor
    if halves := sorted(module for module, parts in modules.items() if not {"lora_down", "lora_up"} <= parts.keys()):
        raise ValueError(
            f"{name} has only one factor of {len(halves)} modules ({first_three(halves)}): export it again"
        )
    return modules


def _module_name(module: str, family: str) -> str:
    if module.startswith(_COMFYUI_PREFIXES):
        return module
    for _ in range(MAX_DEPTH):
        module = module.removeprefix(next((prefix for prefix in _WRAPPERS if module.startswith(prefix)), ""))
    return "lora_unet_" + module.replace(".", "_") if family == "sdxl" else f"transformer.{module}"


def with_alphas(
    modules: dict[str, dict[str, Tensor]], header: StudentHeader | None, name: str
) -> dict[str, dict[str, Tensor]]:
    """Add the header's alpha to modules without one. A file without a header keeps ComfyUI's default, the rank.

    A module's scale is alpha / rank. PEFT writes one alpha for all modules, for the rank in the header; if the header
    has no rank, it is the one that all modules share.

    Raises:
        ValueError: if the header does not say how strong a module is.
    """
    bare = sorted(module for module, parts in modules.items() if "alpha" not in parts)
    if header is None or not bare:
        return modules
    ranks = {len(modules[module]["lora_down"]) for module in bare}
    if header.lora_alpha is None or (header.lora_rank is None and len(ranks) > 1):
        missing = "lora_alpha" if header.lora_alpha is None else f"lora_rank, and its ranks are {sorted(ranks)}"
        raise ValueError(
            f"{name}: {len(bare)} modules have no alpha ({first_three(bare)}) and the header no dpdmd.{missing}, "
            "so their strength is unknown: export the student again"
        )
    scale = header.lora_alpha / (header.lora_rank or ranks.pop())
    return {
        module: {"alpha": torch.tensor(scale * len(parts["lora_down"]))} | parts for module, parts in modules.items()
    }


def check_lora(modules: dict[str, dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuse a LoRA that was not trained on this base model.

    Args:
        modules: result of `lora_modules`.
        shapes: {module: shape [out, in, ...] of its weight in the base model}.
        name: of the file, for messages.

    Raises:
        ValueError: if a module is not in the base model, or its weight has another size.
    """
    unknown = sorted(modules.keys() - shapes.keys())
    if len(unknown) == len(modules):
        raise ValueError(
            f"{name}: none of its {len(modules)} modules is in the base model ({first_three(unknown)}): "
            "it is for another family, connect the model it was trained on"
        )
    if unknown:
        raise ValueError(
            f"{name}: the base model lacks {len(unknown)} modules ({first_three(unknown)}): export it again"
        )
    for module, parts in modules.items():
        size = len(parts["lora_up"]), math.prod(parts["lora_down"].shape[1:])
        shape = shapes[module]
        if size != (shape[0], math.prod(shape[1:])):
            raise ValueError(
                f"{name}: {shorten(module)} is for a weight of {list(size)}, the base model's is {list(shape)}: "
                "connect the model it was trained on"
            )
