"""Pair the pictures of two folders that were drawn from the same seed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from dpdmd_pipeline.scoring.sets import FileSet
from dpdmd_pipeline.wording import counted, listed

_FEW = 3  # files in a message


class Paired(NamedTuple):
    """Pairs of pictures of one prompt."""

    pairs: list[tuple[Path, Path]]  # pictures of A and B, in A's order
    alone: list[Path]  # pictures without a counterpart
    in_order: bool = False  # True if only their order makes the pairs, because names have nothing in common


def pair_up(a: FileSet, b: FileSet, names: tuple[str, str]) -> Paired:
    """Pair pictures by name, else by the last number in the name, else by order.

    If a side lacks some names, the common names still pair safely. Numbers pair only if both sides have the same:
    program A may start to count at 0 and program B at 1.
    """
    for one, name in zip((a, b), names, strict=True):
        if not one.files:
            raise ValueError(f"prompt {one.id!r} has no picture in {name}: draw it, or delete the prompt on both sides")
    a_names, b_names = (_by_key(one, lambda file: file.stem) for one in (a, b))
    if a_names.keys() & b_names.keys():
        pairs = [(file, b_names[name]) for name, file in a_names.items() if name in b_names]
        paired = {file for pair in pairs for file in pair}
        return Paired(pairs, [file for file in (*a.files, *b.files) if file not in paired])
    a_numbers, b_numbers = (_by_key(one, _last_number) for one in (a, b))
    if a_numbers and a_numbers.keys() == b_numbers.keys():
        return Paired([(file, b_numbers[number]) for number, file in a_numbers.items()], [])
    if len(a) != len(b) or a_numbers.keys() & b_numbers.keys():
        sides = " and ".join(_described(one, name) for one, name in zip((a, b), names, strict=True))
        raise ValueError(f"prompt {a.id!r} has {sides}, which do not pair: give pictures of one seed the same name")
    return Paired(list(zip(a.files, b.files, strict=True)), [], in_order=True)


def _by_key(one: FileSet, key: Callable[[Path], str]) -> dict[str, Path]:
    """Files by their key; empty if keys are not unique."""
    files = {key(file): file for file in one.files}
    return files if len(files) == len(one) and "" not in files else {}


def _last_number(file: Path) -> str:
    """The last number in a name without leading zeros, such as 7 of `a red circle_0007.png`; empty without one."""
    numbers = re.findall(r"\d+", file.stem)
    return str(int(numbers[-1])) if numbers else ""


def _described(one: FileSet, name: str) -> str:
    return f"{counted(len(one), 'picture')} in {name} ({listed([file.name for file in one.files], _FEW)})"


def about_pairs(a: Sequence[FileSet], b: Sequence[FileSet], names: tuple[str, str]) -> list[str]:
    """Notes on pictures without a counterpart and on pairs that only their order makes, after `make_arena`."""
    others, notes = {pictures.id: pictures for pictures in b}, []
    by_prompt = {one.id: pair_up(one, others[one.id], names) for one in a}
    alone = [str(file) for paired in by_prompt.values() for file in paired.alone]
    if alone:
        notes.append(f"left out (no picture of the same name on the other side): {listed(alone, _FEW)}")
    in_order = [name for name, paired in by_prompt.items() if paired.in_order]
    if in_order:
        prompts = f"{counted(len(in_order), 'prompt')} ({listed(in_order, _FEW)})"
        notes.append(f"paired by order, because names differ: {prompts}; check that pairs have the same seed")
    return notes
