"""Errors, counts, lists and differences as text."""

from collections.abc import Iterator, Mapping, Sequence
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


def listed(names: Sequence[str], few: int, separator: str = ", ") -> str:
    """The first few of many names, such as `a, b, c and 4 more`."""
    more = f" and {len(names) - few} more" if len(names) > few else ""
    return f"{separator.join(names[:few])}{more}"


def differences(before: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Values of two nested mappings that differ, such as `train.decay=0.1, now 0.2`."""
    for name in dict.fromkeys([*before, *now]):
        old, new = before.get(name), now.get(name)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            yield from differences(old, new, f"{prefix}{name}.")
        elif old != new:
            yield f"{prefix}{name}={short(repr(old), 40)}, now {short(repr(new), 40)}"


def unused(state: str, size: int, changes: Sequence[str], otherwise: str = "code") -> str:
    """The line on finished work that does not belong to this run.

    Args:
        state: what is there, and how far it is.
        size: bytes on the disk.
        changes: differences from this run; if there are none, `otherwise` differs.
    """
    return f"work begins anew: {state} ({size / 2**20:.1f} MiB) differs in {listed(changes, 3, '; ') or otherwise}"
