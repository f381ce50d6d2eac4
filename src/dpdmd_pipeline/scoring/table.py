"""Scores as a table for people and as a record for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.wording import counted, grouped, listed, printable

_FEW = 5  # names per kind of fault in the table; the file has all


def as_table(scores: Scores, already_named: Mapping[str, str] | None = None) -> str:
    """One line per figure, then the missing metrics that no earlier table has named, the faults and the notes."""
    lines = [f"{counted(scores.pictures, 'picture')} of {counted(scores.prompts, 'prompt')}", ""]
    rows = [("metric", "value", "95 % interval", "prompts", "pictures", "protocol")]
    rows += [_row(name, figure) for name, figure in scores.figures.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    named = (already_named or {}).items()
    reasons = grouped((reason, name) for name, reason in scores.missing.items() if (name, reason) not in named)
    sections = (
        ("Not measured", [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]),
        ("Left out of the figures", [f"{len(of)} x {kind}: {listed(of, _FEW)}" for kind, of in scores.faults.items()]),
        ("Notes", scores.notes),
    )
    for title, entries in sections:
        if entries:
            lines += ["", f"{title}:", *(f"  {printable(entry)}" for entry in entries)]
    return "\n".join(lines)


def _row(name: str, figure: dict[str, Any]) -> tuple[str, ...]:
    low, high = figure["low"], figure["high"]
    spread = "" if low is None else f"{_number(low)} to {_number(high)}"
    n = figure["n"]
    total = f" of {n['prompts'] + n['prompts_not_measured']}" if n.get("prompts_not_measured") else ""
    return name, _number(figure["value"]), spread, f"{n['prompts']}{total}", str(n["pictures"]), figure["preset"]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def as_record(scores: Scores) -> dict[str, Any]:
    """All scores as JSON."""
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
    """Share of DMD's loss recovered, one line per metric, then the notes on missing gaps or prompts."""
    lines = ["Gap recovered (0 is the baseline's diversity, 1 the teacher's):"]
    for name, gap in gaps.items():
        lines.append(f"  {name}: {_gap(gap)}  (prompts: {gap['prompts']})")
    if not gaps:
        lines.append("  none: no metric of diversity was measured in all three")
    return "\n".join([*lines, *(f"  {note}" for note in notes)])


def _gap(gap: dict[str, Any]) -> str:
    """Share and interval, or the reason why there is none: such a share may be chance."""
    if gap["value"] is None:
        return "the baseline lost nothing"
    if gap["low"] is not None:
        return f"{_number(gap['value'])}  {_number(gap['low'])} to {_number(gap['high'])}"
    why = "one prompt is not enough" if gap["prompts"] == 1 else "the baseline's loss may be chance"
    return f"{_number(gap['value'])}  no interval: {why}"
