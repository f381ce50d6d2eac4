"""The header that the exporter writes into a student's file: safetensors metadata, strings under `dpdmd.*`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .limits import MAX_CHARACTERS, MAX_DEPTH, MAX_LEVELS, MAX_SHOWN, LimitError, check_limit, shorten

FORMAT = "1"
_LARGEST = 3.4e38  # of float32
_ALLOWED = {
    "family": None,
    "kind": ("full", "lora"),
    "prediction": ("flow", "eps", "v"),
    "sampler": ("euler", "renoise"),
}


@dataclass(frozen=True)
class StudentHeader:
    """The sampling recipe that a student was trained for.

    Attributes:
        family: sd3, sdxl, ...
        kind: full, or lora.
        prediction: the network's output: flow, eps or v.
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
        """Network calls per picture."""
        return len(self.timesteps) if self.sigmas is None else len(self.sigmas) - 1


def read_header(metadata: Mapping[str, str] | None, name: str) -> StudentHeader | None:
    """The header in a safetensors file's metadata; None if there is no DP-DMD header.

    Args:
        metadata: of the file.
        name: of the file, for messages.

    Raises:
        ValueError: if the format is unknown, or a value is missing or impossible.
        LimitError: if a value is longer or deeper than that of any student.
    """
    fields = {key.removeprefix("dpdmd."): value for key, value in (metadata or {}).items() if key.startswith("dpdmd.")}
    if not fields:
        return None
    if fields.get("format") != FORMAT:
        version = _shown(fields, "format")
        raise ValueError(f"{name}: dpdmd.format is {version}, this pack reads {FORMAT!r}: update the DP-DMD node pack")
    try:
        return _parse_header(fields)
    except LimitError as error:
        raise LimitError(f"{name}: {error}") from None
    except ValueError as error:
        raise ValueError(f"{name}: {error}; export the student again") from None


def _parse_header(fields: dict[str, str]) -> StudentHeader:
    words = {key: _word(fields, key, allowed) for key, allowed in _ALLOWED.items()}
    if (guidance := _positive_number(fields, "guidance")) not in (None, 1.0):
        raise ValueError(f"dpdmd.guidance is {guidance}, students are sampled at 1.0")
    is_flow = words["prediction"] == "flow"
    return StudentHeader(
        **words,
        sigmas=_sigmas(fields) if is_flow else None,
        timesteps=None if is_flow else _timesteps(fields),
        shift=_positive_number(fields, "shift"),
        lora_rank=_positive_number(fields, "lora_rank"),
        lora_alpha=_positive_number(fields, "lora_alpha"),
    )


def _word(fields: dict[str, str], key: str, allowed: tuple[str, ...] | None) -> str:
    value = fields.get(key, "full" if key == "kind" else None)  # the first files had no kind and were full
    check_limit(f"dpdmd.{key}", len(value or ""), "characters", MAX_SHOWN)
    if value is None or (allowed and value not in allowed):
        raise ValueError(f"dpdmd.{key} is {value!r}" + (f", not one of {', '.join(allowed)}" if allowed else ""))
    return value


def _positive_number(fields: dict[str, str], key: str) -> float | None:
    if key not in fields:
        return None
    value = _json(fields, key)
    if not _is_number(value) or value <= 0:
        raise ValueError(f"dpdmd.{key} is {_shown(fields, key)}, not a positive number")
    return value


def _sigmas(fields: dict[str, str]) -> tuple[float, ...]:
    values = _numbers(fields, "sigmas")
    if len(values) < 2 or values[0] > 1 or values[-1] != 0 or not _is_falling(values):
        raise ValueError(f"dpdmd.sigmas is {_shown(fields, 'sigmas')}, which does not fall from at most 1 to 0")
    return values


def _timesteps(fields: dict[str, str]) -> tuple[int, ...]:
    values = _numbers(fields, "timesteps")
    if not values or values[-1] < 0 or any(value != int(value) for value in values) or not _is_falling(values):
        raise ValueError(f"dpdmd.timesteps is {_shown(fields, 'timesteps')}, not a list of falling integers")
    return tuple(int(value) for value in values)


def _numbers(fields: dict[str, str], key: str) -> tuple[float, ...]:
    values = _json(fields, key)
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ValueError(f"dpdmd.{key} is {_shown(fields, key)}, not a list of numbers")
    check_limit(f"dpdmd.{key}", len(values), "levels", MAX_LEVELS)
    return tuple(values)


def _json(fields: dict[str, str], key: str) -> Any:
    text = fields.get(key, "null")
    check_limit(f"dpdmd.{key}", len(text), "characters", MAX_CHARACTERS)
    check_limit(f"dpdmd.{key}", text.count("[") + text.count("{"), "lists and objects", MAX_DEPTH)
    try:
        return json.loads(text)
    except ValueError:  # no JSON, or an integer of more digits than Python reads
        raise ValueError(f"dpdmd.{key} is {_shown(fields, key)}, not valid JSON") from None


def _shown(fields: dict[str, str], key: str) -> str:
    return repr(shorten(fields[key])) if key in fields else "None"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_falling(values: tuple[float, ...]) -> bool:
    return all(before > after for before, after in zip(values, values[1:], strict=False))
