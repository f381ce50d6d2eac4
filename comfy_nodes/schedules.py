"""Noise levels: trained, published or given, always as falling sigmas whose last is 0. Torch only.

A flow model's sigma is the share of noise, in [0, 1]. A VP model's is ComfyUI's: sigma / alpha of the paper, so that
latents are x0 + sigma * noise; the numbers come from the model's own table of 1000 timesteps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import StudentHeader

SD35_SHIFT = 3.0  # of the published SD3.5 teacher and student; not the shift that a workflow patched into a model
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
    """What the sigmas of a model mean.

    Attributes:
        prediction: what its network returns: flow, eps or v.
        table: sigma of each of the 1000 timesteps, rising, [1000]; None for flow.
        published: whether this is a family with a published few-step schedule.
    """

    prediction: str
    table: Tensor | None
    published: bool

    @property
    def highest(self) -> float:
        """The noisiest level that the network knows."""
        return 1.0 if self.table is None else float(self.table[-1])


def flow_sigmas(steps: int, shift: float, grid: str) -> Tensor:
    """Levels of a flow sampler, [steps + 1] in float32.

    Args:
        steps: network calls.
        shift: SD3's static shift (arXiv:2403.03206, eq. 23).
        grid: ``shifted`` is linspace(1, 1/n, n) shifted once; ``diffusers`` shifts its end point twice, as
            FlowMatchEulerDiscreteScheduler.set_timesteps does: the grid of the published student.
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
        ValueError: for a timestep that the model does not have.
    """
    if max(timesteps) >= len(table):
        raise ValueError(f"timestep {max(timesteps)} is out of range: this model has {len(table)}")
    return torch.cat([table[torch.tensor(timesteps, device=table.device)].float().cpu(), torch.zeros(1)])


def trained_sigmas(header: StudentHeader, levels: Levels) -> Tensor:
    """All levels that a student was trained on, [N + 1].

    Raises:
        ValueError: if the header and the model disagree about what the network returns.
    """
    if header.prediction != levels.prediction:
        raise ValueError(
            f"the student predicts {header.prediction}, but the model is set to {levels.prediction}: "
            "remove the model-sampling node, or load the student with Load DP-DMD Student"
        )
    if levels.table is None:
        return torch.tensor(header.sigmas)
    return sigmas_of_timesteps(header.timesteps, levels.table)


def part_of(sigmas: Tensor, steps: int) -> Tensor:
    """Fewer steps than trained, on trained levels alone: evenly spread, the first and the final 0 always among them.

    One step is [first, 0], whose result is the draft: the x0 that the student sees after its first step.

    Raises:
        ValueError: for more steps than were trained.
    """
    trained = len(sigmas) - 1
    if steps > trained:
        raise ValueError(f"steps is {steps}, the student was trained for {trained}: set steps to {trained} or fewer")
    return torch.cat([sigmas[[index * trained // steps for index in range(steps)]], sigmas[-1:]])


def sigmas_for(name: str, steps: int, levels: Levels, header: StudentHeader | None, custom: str) -> tuple[Tensor, str]:
    """A schedule by the name in the node's menu.

    Args:
        name: one of NAMES.
        steps: network calls before `denoise` is applied; not used for `custom`.
        levels: of the model.
        header: of the student's file, if it had one.
        custom: sigmas as text, for `custom` alone.

    Returns:
        Sigmas [N + 1] in float32 on the CPU, and where they come from, in words.

    Raises:
        ValueError: if the schedule does not fit the model, naming what does.
    """
    if name == CUSTOM:
        return checked(torch.tensor(parsed(custom)), levels), "custom"
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps is {steps}: set 1 to {MAX_STEPS}")
    if name == AUTO:
        return _automatic(steps, levels, header)
    if (name == TRAILING) != (levels.table is not None):
        fitting = TRAILING if levels.table is not None else f"{OFFICIAL_FLOW} or {UNIFORM_FLOW}"
        raise ValueError(f"schedule {name!r} does not fit a model that predicts {levels.prediction}: choose {fitting}")
    return _named(name, steps, levels, header), name


def _automatic(steps: int, levels: Levels, header: StudentHeader | None) -> tuple[Tensor, str]:
    if header is not None:
        return part_of(trained_sigmas(header, levels), steps), "from the student's file"
    if not levels.published:
        raise ValueError(
            "this model has no DP-DMD header, and its family has no published few-step schedule: "
            "load the student with Load DP-DMD Student, or connect sigmas"
        )
    name = OFFICIAL_FLOW if levels.table is None else TRAILING
    return _named(name, steps, levels, None), f"no DP-DMD header in the model, so its family's published one, {name}"


def _named(name: str, steps: int, levels: Levels, header: StudentHeader | None) -> Tensor:
    if name == TRAILING:
        return sigmas_of_timesteps(trailing_timesteps(steps), levels.table)
    shift = SD35_SHIFT if header is None or header.shift is None else header.shift
    return flow_sigmas(steps, shift, "diffusers" if name == OFFICIAL_FLOW else "shifted")


def parsed(text: str) -> list[float]:
    """Numbers separated by commas or spaces; brackets may stand around them.

    Raises:
        ValueError: if there is anything else.
    """
    words = re.split(r"[,\s]+", text.strip().strip("[]").strip())
    try:
        return [float(word) for word in words]
    except ValueError:
        raise ValueError(f"custom sigmas {text!r} are not numbers: write them like 1, 0.9, 0.75, 0.5, 0") from None


def checked(sigmas: Tensor, levels: Levels) -> Tensor:
    """The same sigmas, if a sampler can use them.

    Raises:
        ValueError: unless they fall strictly, from a level that the model knows, to exactly 0.
    """
    shown = in_words(sigmas)
    if sigmas.ndim != 1 or len(sigmas) < 2:
        raise ValueError(f"sigmas [{shown}] leave no step: give two levels or more, the last 0")
    if not bool((sigmas.diff() < 0).all()):
        raise ValueError(f"sigmas [{shown}] must fall: put them in order, each smaller than the one before")
    if sigmas[-1] != 0:
        raise ValueError(f"sigmas [{shown}] end at {sigmas[-1]:.4g}: end at 0 (of a split schedule, take the low part)")
    if not sigmas[0] <= levels.highest * (1 + 1e-4):
        raise ValueError(f"sigmas [{shown}] start above {levels.highest:.4g}, this model's noisiest level: start there")
    return sigmas


def last_part(sigmas: Tensor, denoise: float) -> Tensor:
    """What image-to-image keeps of a schedule: its last round(steps * denoise) steps, on the same levels.

    Raises:
        ValueError: if denoise is out of [0, 1], or no step remains.
    """
    steps = len(sigmas) - 1
    if not 0 <= denoise <= 1:
        raise ValueError(f"denoise is {denoise}: set it above 0, up to 1")
    kept = math.floor(steps * denoise + 0.5)
    if kept == 0:
        raise ValueError(f"denoise {denoise:g} leaves none of {steps} steps: raise it to {0.5 / steps:.3g} or more")
    return sigmas[steps - kept :]


def in_words(sigmas: Tensor) -> str:
    """1, 0.8577, 0.6022, 0.0089, 0."""
    return ", ".join(f"{value:.4g}" for value in sigmas.flatten().tolist())
