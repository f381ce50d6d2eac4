"""The header of a student: how its weights are sampled. It is the safetensors metadata of the weight file.

Metadata are strings; the keys are `dpdmd.*`. Every sampler of this project takes its schedule from the header and from
nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.sizes import PictureSize, Resolution, check_resolution, sizes_of
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS
from dpdmd_pipeline.limits import MAX_LEVELS, MAX_SHOWN, MAX_SIZE, check_length, parse_json
from dpdmd_pipeline.wording import short

FORMAT = "1"
KINDS = ("full", "lora")
PREDICTIONS = ("flow", "eps", "v")
SAMPLERS = ("euler", "renoise")
_CHOICES = {"family": FAMILIES, "kind": KINDS, "prediction": PREDICTIONS, "sampler": SAMPLERS}  # plain text, not JSON
_REQUIRED = ("family", "guidance", "prediction", "sampler")
_LARGEST = 3.4e38  # of float32


@dataclass(frozen=True)
class StudentHeader:
    """The facts that a sampler needs; values that no sampler of this project can follow are refused.

    Facts that a sampler does not need are None if they are unknown.

    Raises:
        ValueError: with the key, its value and the allowed values.
    """

    family: str  # name of a file in `backbones/`
    sigmas: list[float] | None = None  # flow only: N + 1 falling levels, the first at most 1, the last 0
    prediction: str = "flow"  # output of the network: flow (velocity), eps or v
    sampler: str = "euler"  # deterministic (Euler for flow, DDIM with eta 0 for VP), or renoise
    guidance: float = 1.0  # a student is sampled without classifier-free guidance
    kind: str = "full"  # or lora, to be added to the teacher's weights
    timesteps: list[int] | None = None  # VP only (eps, v): N falling integers below 1000
    shift: float | None = None  # flow only: the family's static shift, for information
    lora_rank: int | None = None  # lora only
    lora_alpha: float | None = None  # lora only; the adapter is scaled by alpha / rank
    resolution: Resolution | None = None  # of the training pictures, see `backbones.sizes`
    max_sequence_length: int | None = None  # tokens of the T5 encoder in training
    identity: str | None = None  # hash of recipe, teacher, anchors, prompts and code, for reuse
    recipe: dict[str, dict[str, Any]] | None = None  # parameter group to the options that decided the weights

    def __post_init__(self) -> None:
        for key, choices in _CHOICES.items():
            self._require(key, getattr(self, key) in choices, f"choose one of {', '.join(choices)}")
        self._require(
            "guidance",
            self.guidance == 1 and self.guidance is not True,
            "a student is sampled without guidance, at 1.0",
        )
        self._check_levels()
        self._check_lora()
        if self.resolution is not None:
            self._check_resolution()
        if self.max_sequence_length is not None:
            self._require_integer("max_sequence_length", 0)
        recipe = {} if self.recipe is None else self.recipe
        valid = isinstance(recipe, dict) and all(isinstance(group, dict) for group in recipe.values())
        self._require("recipe", valid, "give an object of parameter groups")

    def _check_levels(self) -> None:
        if self.prediction == "flow":
            self._require_none("timesteps", "belongs to eps and v, prediction flow has sigmas")
            falling = f"give 2 to {MAX_LEVELS} numbers that fall strictly from at most 1 to 0"
            self._require("sigmas", _are_sigmas(self.sigmas), falling)
            self._require("shift", self.shift is None or _is_positive(self.shift), "give a positive number")
        else:
            for key in ("sigmas", "shift"):
                self._require_none(key, f"belongs to flow, prediction {self.prediction} has timesteps")
            falling = f"give integers that fall strictly from below {NUM_TRAIN_TIMESTEPS} to 0"
            self._require("timesteps", _are_timesteps(self.timesteps), falling)

    def _check_resolution(self) -> None:
        try:
            check_resolution(self.resolution)
        except ValueError as error:
            raise header_error("resolution", self.resolution, str(error)) from error

    def _check_lora(self) -> None:
        if self.kind == "full":
            for key in ("lora_rank", "lora_alpha"):
                self._require_none(key, "belongs to kind lora, this is full")
        else:
            self._require_integer("lora_rank", 1)
            self._require("lora_alpha", _is_positive(self.lora_alpha), "give a positive number")

    def _require(self, key: str, condition: bool, remedy: str) -> None:
        if not condition:
            raise header_error(key, getattr(self, key), remedy)

    def _require_integer(self, key: str, least: int) -> None:
        is_integer = type(value := getattr(self, key)) is int
        self._require(key, is_integer and least <= value <= MAX_SIZE, f"give an integer of {least} to {MAX_SIZE}")

    def _require_none(self, key: str, reason: str) -> None:
        self._require(key, getattr(self, key) is None, reason)

    @property
    def sizes(self) -> list[PictureSize]:
        """Picture sizes of the training, the first one by default; empty if they are unknown."""
        return [] if self.resolution is None else sizes_of(self.resolution)

    @property
    def num_steps(self) -> int:
        """Network evaluations of one picture."""
        return len(self.sigmas) - 1 if self.prediction == "flow" else len(self.timesteps)

    @property
    def lora_scale(self) -> float:
        """Factor of an adapter's change."""
        return self.lora_alpha / self.lora_rank

    @property
    def grid(self) -> list[float] | list[int]:
        """Levels as `Backbone.student_schedule` takes them: N sigmas, or N timesteps."""
        return self.sigmas[:-1] if self.prediction == "flow" else self.timesteps

    def metadata(self) -> dict[str, str]:
        """Convert to safetensors metadata."""
        return {"format": "pt", "dpdmd.format": FORMAT} | {
            f"dpdmd.{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in vars(self).items()
            if value is not None
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> StudentHeader:
        """Convert from safetensors metadata; keys of other programs are ignored."""
        if metadata.get("dpdmd.format") != FORMAT:
            raise header_error("format", metadata.get("dpdmd.format"), f"this version reads {FORMAT!r}")
        for key in _REQUIRED:
            if f"dpdmd.{key}" not in metadata:
                raise ValueError(f"dpdmd.{key} is missing in the header: export the student again")
        texts = {key: metadata.get(f"dpdmd.{key}") for key in cls.__dataclass_fields__}
        return cls(**{key: _parse(key, text) for key, text in texts.items() if text is not None})


def header_error(key: str, value: Any, remedy: str) -> ValueError:
    """Error about one value of a header."""
    return ValueError(f"dpdmd.{key} is {short(repr(value), MAX_SHOWN)}: {remedy}")


def _parse(key: str, text: str) -> Any:
    try:
        check_length(text)
        return text if key in _CHOICES or key == "identity" else parse_json(text)
    except ValueError as error:
        raise header_error(key, text, f"{error}; export the student again") from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _are_sigmas(values: Any) -> bool:
    numbers = isinstance(values, list) and 1 < len(values) <= MAX_LEVELS and all(map(_is_number, values))
    return numbers and values[0] <= 1 and values[-1] == 0 and _falls(values)


def _are_timesteps(values: Any) -> bool:
    integers = isinstance(values, list) and bool(values) and all(type(value) is int for value in values)
    return integers and values[0] < NUM_TRAIN_TIMESTEPS and values[-1] >= 0 and _falls(values)


def _falls(values: list) -> bool:
    return values == sorted(set(values), reverse=True)
