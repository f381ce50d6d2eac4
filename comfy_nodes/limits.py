"""Limits for untrusted files and texts, and long values cut for messages. Standard library only."""

from __future__ import annotations

MAX_DEPTH = 8  # dicts or lists in each other, prefixes of one key
MAX_CHARACTERS = 2**16  # of one value in a header
MAX_LEVELS = 1001  # a model has 1000 timesteps, and the last level is 0
MAX_SHOWN = 200  # characters of a value in a message; no word in a header is longer


class LimitError(ValueError):
    """Contents that are deeper or longer than those of any student."""


def check_limit(name: str, size: int, unit: str, limit: int) -> None:
    """Refuse contents beyond a limit.

    Raises:
        LimitError: with the name, the size and the limit.
    """
    if size > limit:
        raise LimitError(f"{name} has {size} {unit}, the limit is {limit}: export the student again")


def shorten(text: str) -> str:
    """The beginning of a long text, for a message; a short text as it is."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}... ({len(text)} characters)"
