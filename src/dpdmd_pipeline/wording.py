"""Errors, counts and lists in sentences."""

from collections.abc import Sequence
from typing import Any


def one_line(said: Any) -> str:
    """The text of an error, or of anything else, without line breaks or repeated spaces."""
    return " ".join(str(said).split())


def counted(number: int, one: str, more: str = "") -> str:
    """`1 answer`, `2 answers`."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def listed(names: Sequence[str], few: int) -> str:
    """`a, b, c and 4 more`: the first few of many."""
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return f"{', '.join(names[:few])}{more}"
