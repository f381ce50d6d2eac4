"""Errors, counts and lists as text."""

from collections.abc import Sequence
from typing import Any


def one_line(message: Any) -> str:
    """The text of an error, or of anything else, without line breaks or repeated spaces."""
    return " ".join(str(message).split())


def printable(text: str) -> str:
    """Escape line breaks and terminal commands, which names in files may contain."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def short(text: str, length: int) -> str:
    """The text, or its first characters and an ellipsis."""
    return text if len(text) <= length else f"{text[:length]}..."


def counted(number: int, one: str, more: str = "") -> str:
    """A number and its noun, such as `1 answer` or `2 answers`."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def listed(names: Sequence[str], few: int) -> str:
    """The first few of many names, such as `a, b, c and 4 more`."""
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return f"{', '.join(names[:few])}{more}"
