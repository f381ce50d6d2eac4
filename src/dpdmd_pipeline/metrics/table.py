"""Scores as a person reads them, and as a file keeps them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.metrics.score import Scores
from dpdmd_pipeline.wording import counted, listed

_NAMED = 5  # names of faulty pictures in the table; the file has all


def as_table(scores: Scores, said: Mapping[str, str] | None = None) -> str:
    """One line a figure, then what is missing, what was left out, and what to know.

    Args:
        scores: to show.
        said: missing metrics that another table has named already.
    """
    lines = [f"{counted(scores.pictures, 'picture')} of {counted(scores.prompts, 'prompt')}", ""]
    rows = [("metric", "value", "95 % interval", "prompts", "pictures", "protocol")]
    rows += [_row(name, figure) for name, figure in scores.figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    sections = (
        ("Not measured", _missing(scores.missing, said or {})),
        ("Left out of the figures", [_fault(kind, names) for kind, names in scores.faults.items()]),
        ("To know", scores.notes),
    )
    for title, entries in sections:
        if entries:
            lines += ["", f"{title}:", *(f"  {_printable(entry)}" for entry in entries)]
    return "\n".join(lines)


def _printable(text: str) -> str:
    """With what would break the line or command the terminal written out: file names may hold anything."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def _missing(missing: Mapping[str, str], said: Mapping[str, str]) -> list[str]:
    """One line a reason, which several metrics may share."""
    names: dict[str, list[str]] = {}
    for name, reason in missing.items():
        if said.get(name) != reason:
            names.setdefault(reason, []).append(name)
    return [f"{', '.join(found)}: {reason}" for reason, found in names.items()]


def _row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    low, high = figure["low"], figure["high"]
    spread = "" if low is None else f"{_number(low)} to {_number(high)}"
    n = figure["n"]
    left = f" of {n['prompts'] + n['prompts_not_measured']}" if n.get("prompts_not_measured") else ""
    return name, _number(figure["value"]), spread, f"{n['prompts']}{left}", str(n["pictures"]), figure["preset"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _fault(kind: str, names: list[str]) -> str:
    return f"{len(names)} x {kind}: {listed(names, _NAMED)}"


def as_record(scores: Scores) -> dict[str, Any]:
    """The same, complete, as JSON."""
    return {
        "format": 1,
        "prompts": scores.prompts,
        "pictures": scores.pictures,
        "figures": scores.figures,
        "per_prompt": scores.per_prompt,
        "missing": scores.missing,
        "faults": {kind: {"count": len(names), "names": names} for kind, names in scores.faults.items()},
        "notes": scores.notes,
        "usable": scores.usable,
        "weights": scores.weights,
    }


def as_gap_table(gaps: dict[str, dict[str, Any]], notes: Sequence[str] = ()) -> str:
    """Share of DMD's loss recovered, one line a metric, then what is not in it.

    Args:
        gaps: by full name of their figures.
        notes: why some lack prompts, or are not there.
    """
    lines = ["Gap recovered (0 is the baseline's diversity, 1 the teacher's):"]
    for name, gap in gaps.items():
        lines.append(f"  {name}: {_gap(gap)}  (prompts: {gap['prompts']})")
    if not gaps:
        lines.append("  none: no diversity was measured in all three")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _gap(gap: dict[str, Any]) -> str:
    """Share and interval; a share without one is a number that chance may have made, and is called so."""
    if gap["value"] is None:
        return "the baseline lost nothing"
    if gap["low"] is not None:
        return f"{_number(gap['value'])}  {_number(gap['low'])} to {_number(gap['high'])}"
    why = "one prompt gives none" if gap["prompts"] == 1 else "the baseline's loss cannot be told from chance"
    return f"{_number(gap['value'])}  no interval: {why}"
