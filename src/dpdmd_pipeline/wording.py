"""Errors, counts, lists and differences as text, and the characters that untrusted texts may have."""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

COLOURS = {"teacher": "#23211e", "DMD": "#c2601c", "DP-DMD": "#1f6a8c"}  # of the models, in every drawing

made = logging.getLogger("dpdmd_pipeline.made")  # a stage says here what it made: the screen shows it in its line

# Control characters other than white space, and halves of surrogate pairs (JSON can spell them).
_REFUSED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")
# Anything but white space and zero-width characters (Unicode's Default_Ignorable_Code_Point).
_VISIBLE = re.compile(
    "[^\\s\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    "\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


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


def reuse_refusal(state: str, size: int, changes: Sequence[str], otherwise: str = "code") -> str:
    """The line on finished work that does not belong to this run.

    Args:
        state: what is there, and how far it is.
        size: bytes on the disk.
        changes: differences from this run; if there are none, `otherwise` differs.
    """
    return f"starting over: {state} ({size / 2**20:.1f} MiB) differs in {listed(changes, 3, '; ') or otherwise}"


def grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list[Any]]:
    """Values by key, both in the order of the pairs."""
    groups: dict[Any, list[Any]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups


def validation_faults(error: Any) -> str:
    """Faults of a pydantic error, such as `format: Input should be 1, got 2; include.0.count: Field required`."""
    lines = []
    for fault in error.errors():
        path, value = ".".join(map(str, fault["loc"])), fault["input"]
        got = f", got {short(repr(value), 40)}" if isinstance(value, str | int | float) else ""
        lines.append(f"{path}: "[: len(path) * 2] + fault["msg"].removeprefix("Value error, ") + got)
    return "; ".join(lines)


# ---- characters


def is_blank(text: str) -> bool:
    """True for a text of white space and zero-width characters only."""
    return not _VISIBLE.search(text)


def refused_character(text: str) -> tuple[str, int] | None:
    """Name and index of the first character that no tokenizer should see; None if there is none."""
    match = _REFUSED.search(text)
    if not match:
        return None
    if match[0] == "\0":
        return "NUL", match.start()
    kind = "half a surrogate pair" if match[0] >= "\ud800" else "control character"
    return f"{kind} U+{ord(match[0]):04X}", match.start()


def is_utf16(raw: bytes) -> bool:
    """True if about every second byte is NUL, as in UTF-16 text of Latin letters."""
    even, odd = raw[::2].count(0), raw[1::2].count(0)
    return min(even, odd) == 0 and max(even, odd) > max(1, len(raw) // 4)
