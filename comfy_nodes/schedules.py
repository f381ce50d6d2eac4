"""Noise levels (trained, published or custom) as falling sigmas that end at 0. Torch only.

A flow model's sigma is the share of noise, in [0, 1]. A VP model's sigma is ComfyUI's, which is sigma / alpha of the
paper: latents are x0 + sigma * noise. Its values come from the model's own table of 1000 timesteps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from torch import Tensor

from .header import StudentHeader
from .limits import MAX_LEVELS, shorten

SD35_SHIFT = 3.0  # of the published SD3.5 teacher and student; a shift patched into the model does not count
MAX_STEPS = 16
_NUM_TRAIN_TIMESTEPS = 1000

AUTO = "auto"
OFFICIAL_FLOW = "SD3.5 official (diffusers flow)"
UNIFORM_FLOW = "uniform (simple)"
TRAILING = "SDXL trailing"
CUSTOM = "custom"
NAMES = (AUTO, OFFICIAL_FLOW, UNIFORM_FLOW, TRAILING, CUSTOM)


@dataclass(frozen=True)
class Levels:
    """The noise levels of a model.

    Attributes:
        prediction: its network's output: flow, eps or v.
        table: sigma of each of the 1000 timesteps, rising, [1000]; None for flow.
        published: True if its family has a published few-step schedule.
    """

    prediction: str
    table: Tensor | None
    published: bool

    @property
    def highest(self) -> float:
        """The noisiest level of the model."""
        return 1.0 if self.table is None else float(self.table[-1])


def flow_sigmas(steps: int, shift: float, grid: str) -> Tensor:
    """Levels of a flow sampler, [steps + 1] in float32.

    Args:
        steps: network calls.
        shift: SD3's static shift (arXiv:2403.03206, eq. 23).
        grid: `shifted` is linspace(1, 1/n, n) shifted once. `diffusers`, the grid of the published student, shifts
            its end point twice, as FlowMatchEulerDiscreteScheduler.set_timesteps does.
    """
    smallest = 1 / steps if grid == "shifted" else _shifted(1 / _NUM_TRAIN_TIMESTEPS, shift)
    uniform = torch.linspace(1, smallest, steps, dtype=torch.float64)
    return torch.cat([_shifted(uniform, shift), torch.zeros(1, dtype=torch.float64)]).float()


def _shifted(sigma, shift: float):
    return shift * sigma / (1 + (shift - 1) * sigma)


def trailing_timesteps(steps: int) -> list[int]:
    """Timesteps that start at the last one (arXiv:2305.08891): 999, 749, 499, 249 for four."""
    ends = torch.arange(steps, 0, -1, dtype=torch.float64) * _NUM_TRAIN_TIMESTEPS / steps
    return (ends.round().long() - 1).tolist()


def sigmas_of_timesteps(timesteps: Sequence[int], table: Tensor) -> Tensor:
    """Levels at integer timesteps of a VP model, [N + 1].

    Raises:
        ValueError: for a timestep outside the model's table.
    """
    if max(timesteps) >= len(table):
        raise ValueError(f"timestep {max(timesteps)} is out of range: this model has {len(table)}")
    return torch.cat([table[torch.tensor(timesteps, device=table.device)].float().cpu(), torch.zeros(1)])


def trained_sigmas(header: StudentHeader, levels: Levels) -> Tensor:
    """All levels that a student was trained on, [N + 1].

    Raises:
        ValueError: if the header and the model disagree about the network's output.
    """
    if header.prediction != levels.prediction:
        raise ValueError(
            f"the student predicts {header.prediction}, but the model is set to {levels.prediction}: "
            "remove the model-sampling node, or load the student with Load DP-DMD Student"
        )
    if levels.table is None:
        return torch.tensor(header.sigmas)
    return sigmas_of_timesteps(header.timesteps, levels.table)


def trained_subset(sigmas: Tensor, steps: int) -> Tensor:
    """Evenly spread trained levels for fewer steps, always with the first level and the final 0.

    One step is [first, 0]. It gives a draft: the x0 that the student predicts at its first step.

    Raises:
        ValueError: for more steps than the trained number.
    """
    trained = len(sigmas) - 1
    if steps > trained:
        raise ValueError(f"steps is {steps}, the student was trained for {trained}: set steps to {trained} or fewer")
    return torch.cat([sigmas[[index * trained // steps for index in range(steps)]], sigmas[-1:]])


def sigmas_for(name: str, steps: int, levels: Levels, header: StudentHeader | None, custom: str) -> tuple[Tensor, str]:
    """A schedule by its name in the node's menu.

    Args:
        name: one of NAMES.
        steps: network calls before `denoise` is applied, 0 for the trained number; not used for `custom`.
        levels: of the model.
        header: of the student's file, if it has one.
        custom: sigmas as text, only for `custom`.

    Returns:
        Sigmas [N + 1] in float32 on the CPU, and a phrase for their source.

    Raises:
        ValueError: if the schedule does not fit the model, or is `auto` without a header; the message names one that
            fits.
    """
    if name not in NAMES:
        raise ValueError(f"schedule {name!r} is unknown: choose {', '.join(NAMES)}")
    if name == CUSTOM:
        return check_sigmas(torch.tensor(parse_sigmas(custom)), levels), "custom"
    if not isinstance(steps, Integral) or not 0 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}: set a whole number from 1 to {MAX_STEPS}, or 0 for the trained number")
    if name == AUTO and header is None:
        raise ValueError(
            f"this model has no DP-DMD header, its trained levels are unknown: {advice_without_header(levels)}"
        )
    steps = steps or _trained_steps(header)
    if name == AUTO:
        return trained_subset(trained_sigmas(header, levels), steps), "from the student's file"
    if (name == TRAILING) != (levels.table is not None):
        fitting = TRAILING if levels.table is not None else f"{OFFICIAL_FLOW} or {UNIFORM_FLOW}"
        raise ValueError(f"schedule {name!r} does not fit a model that predicts {levels.prediction}: choose {fitting}")
    return _named(name, steps, levels, header), name


def _trained_steps(header: StudentHeader | None) -> int:
    if header is None:
        raise ValueError(
            "steps is 0, the trained number, but this model has no DP-DMD header: set the number of steps it was "
            "trained for"
        )
    return header.steps


def warning_without_header(levels: Levels) -> str:
    """Warning for a sampled student whose file does not say how."""
    warning = "Warning: no DP-DMD header, so levels and method are a choice, not the student's own."
    if levels.table is None:
        return warning
    other = "v" if levels.prediction == "eps" else "eps"
    return f"{warning} Its output is read as {levels.prediction}: set ModelSamplingDiscrete if it predicts {other}."


def advice_without_header(levels: Levels) -> str:
    """Remedy for a student whose file does not name its levels, for messages."""
    name = OFFICIAL_FLOW if levels.table is None else TRAILING
    published = f"'{name}' is published for its family" if levels.published else "none is published for its family"
    return (
        f"choose the trained schedule in DP-DMD Scheduler ({published}) and connect its sigmas, "
        "or load a file with a header in Load DP-DMD Student"
    )


def _named(name: str, steps: int, levels: Levels, header: StudentHeader | None) -> Tensor:
    if name == TRAILING:
        return sigmas_of_timesteps(trailing_timesteps(steps), levels.table)
    shift = SD35_SHIFT if header is None or header.shift is None else header.shift
    return flow_sigmas(steps, shift, "diffusers" if name == OFFICIAL_FLOW else "shifted")


def parse_sigmas(text: str) -> list[float]:
    """Numbers separated by commas or spaces, with or without brackets.

    Raises:
        ValueError: for any other text.
    """
    words = re.split(r"[,\s]+", text.strip().strip("[]").strip())
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(
            f"custom sigmas {shorten(text)!r} are not numbers: write them like 1, 0.9, 0.75, 0.5, 0"
        ) from None


def check_sigmas(sigmas: Tensor, levels: Levels) -> Tensor:
    """Return the sigmas if a sampler can use them.

    Raises:
        ValueError: unless they are 2 to MAX_LEVELS and fall strictly, from a level of the model to exactly 0.
    """
    shown = format_sigmas(sigmas)
    if sigmas.ndim != 1 or not 2 <= len(sigmas) <= MAX_LEVELS:
        raise ValueError(
            f"sigmas [{shown}] of shape {list(sigmas.shape)} are no sampling steps: "
            f"give a list of 2 to {MAX_LEVELS} levels, the last 0"
        )
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas [{shown}] must fall: put them in order, each smaller than the one before")
    if sigmas[-1] != 0:
        raise ValueError(f"sigmas [{shown}] end at {sigmas[-1]:.4g}: end at 0 (of a split schedule, take the low part)")
    if not sigmas[0] <= levels.highest * (1 + 1e-4):
        raise ValueError(f"sigmas [{shown}] start above {levels.highest:.4g}, this model's noisiest level: start there")
    return sigmas


def last_steps(sigmas: Tensor, denoise: float) -> Tensor:
    """The last round(steps * denoise) steps of a schedule, on the same levels, for image-to-image.

    Raises:
        ValueError: if denoise is outside [0, 1], or no step remains.
    """
    steps = len(sigmas) - 1
    if not isinstance(denoise, Real) or not 0 <= denoise <= 1:
        raise ValueError(f"denoise is {denoise}: set it above 0, up to 1")
    remaining = math.floor(steps * denoise + 0.5)
    if remaining == 0:
        raise ValueError(f"denoise {denoise:g} leaves none of {steps} steps: raise it to {0.5 / steps:.3g} or more")
    return sigmas[steps - remaining :]


def format_sigmas(sigmas: Tensor) -> str:
    """Sigmas as text, cut if it is long: 1, 0.8577, 0.6022, 0.0089, 0."""
    return shorten(", ".join(f"{value:.4g}" for value in sigmas.flatten().tolist()))
