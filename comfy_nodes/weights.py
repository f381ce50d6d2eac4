"""Reading a student's file: its header, its tensors, the names of its keys. torch and safetensors only.

The header is the safetensors metadata that the exporter writes, strings under `dpdmd.*`. What is wrong with a file is
said in one line that names it and the remedy; ComfyUI shows the line in the node.
"""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

FORMAT = "1"
FOLDERS = ("diffusion_models", "loras")
_ALLOWED = {
    "family": None,
    "kind": ("full", "lora"),
    "prediction": ("flow", "eps", "v"),
    "sampler": ("euler", "renoise"),
}
_WRAPPERS = (
    "model.diffusion_model.",
    "module.",
    "student.",
    "transformer.",
    "unet.",
)  # what trainers and savers put in front of every key
_LORA_WRAPPERS = ("base_model.model.", "transformer.", "unet.")
_LORA_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<factor>lora_A|lora_B|lora_down|lora_up)(?:\.[^.]+)?\.weight|(?P<alpha>alpha))"
)
_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_WITHOUT_PICKLE = (".safetensors", ".sft")


@dataclass(frozen=True)
class StudentHeader:
    """How a student is sampled, as its trainer says.

    Attributes:
        family: sd3, sdxl, ...
        kind: full, or lora.
        prediction: what the network returns: flow, eps or v.
        sampler: euler (deterministic) or renoise.
        sigmas: flow only: N + 1 falling levels, the last 0.
        timesteps: VP only: N falling integers.
        shift: flow only: the family's static shift; None if unknown.
        lora_rank, lora_alpha: lora only; None if unknown.
    """

    family: str
    kind: str
    prediction: str
    sampler: str
    sigmas: tuple[float, ...] | None = None
    timesteps: tuple[int, ...] | None = None
    shift: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None

    @property
    def steps(self) -> int:
        """Network calls of one picture."""
        return len(self.timesteps) if self.sigmas is None else len(self.sigmas) - 1


def read_header(metadata: Mapping[str, str] | None, name: str) -> StudentHeader | None:
    """The header in a file's metadata; None if it has none of ours.

    Args:
        metadata: of a safetensors file.
        name: of the file, for messages.

    Raises:
        ValueError: if the format is not known here, or a value is missing or impossible.
    """
    found = {key.removeprefix("dpdmd."): value for key, value in (metadata or {}).items() if key.startswith("dpdmd.")}
    if not found:
        return None
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{name}: dpdmd.format is {found.get('format')!r}, this pack reads {FORMAT!r}: update the DP-DMD node pack"
        )
    try:
        return _header(found)
    except ValueError as error:
        raise ValueError(f"{name}: {error}; export the student again") from None


def _header(found: dict[str, str]) -> StudentHeader:
    words = {key: _word(found, key, allowed) for key, allowed in _ALLOWED.items()}
    if (guidance := _number(found, "guidance")) not in (None, 1.0):
        raise ValueError(f"dpdmd.guidance is {guidance}, students are sampled at 1.0")
    flow = words["prediction"] == "flow"
    return StudentHeader(
        **words,
        sigmas=_sigmas(found) if flow else None,
        timesteps=None if flow else _timesteps(found),
        shift=_number(found, "shift"),
        lora_rank=_number(found, "lora_rank"),
        lora_alpha=_number(found, "lora_alpha"),
    )


def _word(found: dict[str, str], key: str, allowed: tuple[str, ...] | None) -> str:
    value = found.get(key, "full" if key == "kind" else None)  # the first files had no kind and were full
    if value is None or (allowed and value not in allowed):
        raise ValueError(f"dpdmd.{key} is {value!r}" + (f", not one of {', '.join(allowed)}" if allowed else ""))
    return value


def _number(found: dict[str, str], key: str) -> float | None:
    if key not in found:
        return None
    value = _json(found, key)
    if not _is_number(value) or value <= 0:
        raise ValueError(f"dpdmd.{key} is {found[key]!r}, not a positive number")
    return value


def _sigmas(found: dict[str, str]) -> tuple[float, ...]:
    values = _numbers(found, "sigmas")
    if len(values) < 2 or values[0] > 1 or values[-1] != 0 or not _fall(values):
        raise ValueError(f"dpdmd.sigmas is {found['sigmas']}, which does not fall from at most 1 to 0")
    return values


def _timesteps(found: dict[str, str]) -> tuple[int, ...]:
    values = _numbers(found, "timesteps")
    if not values or values[-1] < 0 or any(value != int(value) for value in values) or not _fall(values):
        raise ValueError(f"dpdmd.timesteps is {found['timesteps']}, which are not falling integers")
    return tuple(int(value) for value in values)


def _numbers(found: dict[str, str], key: str) -> tuple[float, ...]:
    values = _json(found, key)
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ValueError(f"dpdmd.{key} is {found.get(key)!r}, not a list of numbers")
    return tuple(values)


def _json(found: dict[str, str], key: str) -> Any:
    try:
        return json.loads(found.get(key, "null"))
    except json.JSONDecodeError:
        raise ValueError(f"dpdmd.{key} is {found[key]!r}, which cannot be read") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fall(values: tuple[float, ...]) -> bool:
    return all(before > after for before, after in zip(values, values[1:], strict=False))


# ---- files


def folder_and_file(student_name: str) -> tuple[str, str]:
    """Split a name of the node's list: `diffusion_models/sd35.safetensors` is a file of ComfyUI's models folder.

    Raises:
        ValueError: if it is not in one of the two folders, or leaves it.
    """
    folder, _, file = student_name.replace("\\", "/").partition("/")
    path = PurePosixPath(file)
    if folder not in FOLDERS or not path.parts or path.is_absolute() or ".." in path.parts or ":" in file:
        raise ValueError(
            f"student_name {student_name!r} is not inside models/{FOLDERS[0]} or models/{FOLDERS[1]}: "
            "put the file there, refresh, and choose it from the list"
        )
    return folder, file


def load_state(path: str, name: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """All tensors of a file on the CPU, and its metadata (None for a pickle). Code in a pickle is never run.

    Raises:
        OSError: if the file cannot be read whole.
        ValueError: if it holds anything but weights.
    """
    if not path.lower().endswith(_WITHOUT_PICKLE):
        return _unpickled(path, name), None
    try:
        with safe_open(path, framework="pt") as file:
            state, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    except SafetensorError as error:
        raise OSError(f"{name} is no whole safetensors file ({error}): download or export it again") from None
    if not state:
        raise ValueError(f"{name} holds no tensors: export it again")
    return state, metadata


def _unpickled(path: str, name: str) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} holds more than weights (code, or a whole model object), or is no torch file; it was not run: "
            "save its state_dict as .safetensors"
        ) from None
    except Exception as error:  # bytes that are no pickle end the reader in any way
        raise OSError(f"{name} is no whole torch file ({first_line(error)}): download it again") from None
    return _innermost(state, name)


def _innermost(state: Any, name: str) -> dict[str, Tensor]:
    """The state dict inside {"state_dict": ...} or any other dict with one entry."""
    while isinstance(state, dict) and ("state_dict" in state or len(state) == 1):
        inner = state.get("state_dict", next(iter(state.values())))
        if not isinstance(inner, dict):
            break
        state = inner
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name} holds a {type(state).__name__}, not a state dict: save the network's state_dict")
    if strange := sorted(str(key) for key, value in state.items() if not isinstance(value, Tensor)):
        raise ValueError(f"{name} holds more than tensors ({listed(strange)}): save the network's state_dict alone")
    return state


def first_line(error: Exception) -> str:
    """What an error says, without its list of details."""
    return str(error).strip().split("\n")[0][:200]


# ---- keys


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys as the network has them: what stands in front of every one of them is taken away."""
    while wrapper := next((text for text in _WRAPPERS if all(key.startswith(text) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return dict(state)


def is_lora(state: Iterable[str]) -> bool:
    """Whether these are keys of a LoRA."""
    return any(_LORA_KEY.fullmatch(key) and not key.endswith(".alpha") for key in state)


def check_keys(found: Iterable[str], expected: Iterable[str], name: str) -> None:
    """Refuse a student that does not fill its network exactly.

    Raises:
        ValueError: naming the first three keys too many, or missing.
    """
    found, expected = set(found), set(expected)
    if surplus := sorted(found - expected):
        raise ValueError(f"{name} has {len(surplus)} keys that the network lacks ({listed(surplus)}): export it again")
    if missing := sorted(expected - found):
        raise ValueError(f"{name} lacks {len(missing)} of {len(expected)} keys ({listed(missing)}): export it again")


def lora_modules(state: Mapping[str, Tensor], family: str, name: str) -> dict[str, dict[str, Tensor]]:
    """A LoRA by module, in the spelling that ComfyUI reads for the family.

    Every way of PEFT and diffusers to spell a key is understood; ComfyUI itself leaves out what it does not know
    and says so in its log alone.

    Args:
        state: keys as in the file.
        family: of the base model.
        name: of the file, for messages.

    Returns:
        {module: {"lora_down": [rank, in, ...], "lora_up": [out, rank, ...], "alpha": []}}, alpha only if it was given.

    Raises:
        ValueError: for a key that is no part of a LoRA, or a module without one of its two factors.
    """
    modules: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, value in state.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            strange.append(key)
            continue
        factor = match["alpha"] or _FACTORS.get(match["factor"], match["factor"])
        modules.setdefault(_module_name(match["module"], family), {})[factor] = value
    if strange:
        raise ValueError(f"{name} has {len(strange)} keys of no LoRA ({listed(sorted(strange))}): export it again")
    if halves := sorted(module for module, parts in modules.items() if not {"lora_down", "lora_up"} <= parts.keys()):
        raise ValueError(f"{name} has only one factor of {len(halves)} modules ({listed(halves)}): export it again")
    return modules


def _module_name(module: str, family: str) -> str:
    if module.startswith(("lora_unet_", "lora_transformer_", "lycoris_", "diffusion_model.")):
        return module
    while wrapper := next((text for text in _LORA_WRAPPERS if module.startswith(text)), None):
        module = module.removeprefix(wrapper)
    return "lora_unet_" + module.replace(".", "_") if family == "sdxl" else f"transformer.{module}"


def with_alphas(modules: dict[str, dict[str, Tensor]], header: StudentHeader | None) -> dict[str, dict[str, Tensor]]:
    """Modules whose alpha the file leaves out get the header's; without a header alpha is the rank, as everywhere."""
    if header is None or header.lora_rank is None or header.lora_alpha is None:
        return modules
    scale = header.lora_alpha / header.lora_rank
    return {name: {"alpha": torch.tensor(scale * len(parts["lora_down"]))} | parts for name, parts in modules.items()}


def check_lora(modules: dict[str, dict[str, Tensor]], shapes: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Refuse a LoRA that was not trained on this base model.

    Args:
        modules: as `lora_modules` gives them.
        shapes: of the weight [out, in, ...] behind every module name that the base model knows.
        name: of the file, for messages.

    Raises:
        ValueError: if no module, or not every one, is the base model's, or one has another size.
    """
    unknown = sorted(modules.keys() - shapes.keys())
    if len(unknown) == len(modules):
        raise ValueError(
            f"{name}: none of its {len(modules)} modules is in the base model ({listed(unknown)}): "
            "it is for another family, connect the model it was trained on"
        )
    if unknown:
        raise ValueError(f"{name}: the base model lacks {len(unknown)} modules ({listed(unknown)}): export it again")
    for module, parts in modules.items():
        size, wanted = _size(parts), shapes[module]
        if size != (wanted[0], math.prod(wanted[1:])):
            raise ValueError(
                f"{name}: {module} is for a weight of {list(size)}, the base model's is {list(wanted)}: "
                "connect the model it was trained on"
            )


def _size(parts: dict[str, Tensor]) -> tuple[int, int]:
    return len(parts["lora_up"]), math.prod(parts["lora_down"].shape[1:])


def listed(names: list[str]) -> str:
    """The first three of many names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
