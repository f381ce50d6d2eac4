"""The teacher's levels of a teacher start: from pure noise to one of the student's levels. Torch only."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .schedules import Levels, format_sigmas


def join_levels(student: Tensor, landing: int, teacher_steps: int, levels: Levels) -> Tensor:
    """Levels of a whole run: the teacher's, down to the student's level `landing`, then the student's remaining ones.

    The teacher's levels are at equal distances in the network's timestep: in sigma for flow, in whole timesteps for
    eps and v.

    Args:
        student: its falling levels, [N + 1].
        landing: number of the student's first steps that the teacher's replace.
        teacher_steps: steps of the teacher.
        levels: of both models.

    Returns:
        Falling levels, [teacher_steps + N - landing + 1].

    Raises:
        ValueError: if a number is out of range, or the levels of `teacher_steps` steps are not distinct.
    """
    last = len(student) - 2
    if last < 1:
        raise ValueError(
            f"sigmas [{format_sigmas(student)}] are one step: a teacher start needs a student of two or more"
        )
    if not isinstance(landing, Integral) or not 1 <= landing <= last:
        raise ValueError(
            f"landing is {landing}: set 1 to {last}; at 0 the teacher has no step, and the student of {last + 1} steps "
            "needs the last one"
        )
    if not isinstance(teacher_steps, Integral) or teacher_steps < 1:
        raise ValueError(f"teacher_steps is {teacher_steps}: set a whole number of 1 or more")
    joined = torch.cat([_between(student[0], student[landing], teacher_steps, levels), student[landing:]])
    if not bool((joined.diff() < 0).all()):
        raise ValueError(
            f"teacher_steps is {teacher_steps}, too many between the levels {student[0]:.4g} and "
            f"{student[landing]:.4g}: set fewer, or a higher landing"
        )
    return joined


def _between(start: Tensor, end: Tensor, steps: int, levels: Levels) -> Tensor:
    """Levels of `steps` steps without the last one, [steps]."""
    if levels.table is None:
        return torch.linspace(start.item(), end.item(), steps + 1)[:-1].to(start)
    table = levels.table.to(start)
    first, last = ((table.log() - sigma.log()).abs().argmin().item() for sigma in (start, end))
    timesteps = torch.linspace(first, last, steps + 1)[1:-1].round().long()
    return torch.cat([start[None], table[timesteps.to(table.device)]])
