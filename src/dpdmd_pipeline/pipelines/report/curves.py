"""Lay out the curves of the histories for SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

CURVES = {
    "dmd_loss": ("DMD loss", "Pulls the pictures towards what the teacher finds likely; it need not fall."),
    "diversity_loss": (
        "Diversity loss",
        "Distance of DP-DMD's anchored steps from the teacher's; DMD has no such loss.",
    ),
    "fake_score_loss": (
        "Fake-score loss",
        "Error of the network that tracks the student's distribution.",
    ),
    "latent_diversity": (
        "Diversity during training",
        "Distance between latents of the same prompt; it falls as diversity is lost.",
    ),
    "correction": ("Quality during training", "Change that the teacher makes to a noised latent; lower is better."),
    "grad_ratio": ("Gradient ratio", "Weighted diversity gradient divided by the DMD gradient; 1 means balance."),
}
PLOT = {"left": 46, "right": 352, "top": 12, "bottom": 170}  # in a picture of 360 x 196


def make_curves(runs: Mapping[str, list[dict]], num_points: int) -> list[dict[str, Any]]:
    """One panel per entry of CURVES with positive values."""
    runs = {**runs, "teacher": _teacher_history(runs)}
    return [curve for key in CURVES if (curve := make_curve(key, runs, num_points))]


def make_curve(key: str, runs: Mapping[str, list[dict]], num_points: int) -> dict[str, Any] | None:
    """One panel with a logarithmic axis, ready to draw; None if no run has a positive value."""
    averaged = {name: _averaged(rows, key, num_points) for name, rows in runs.items()}
    averaged = {name: points for name, points in averaged.items() if points}
    if not averaged:
        return None
    values = [value for points in averaged.values() for _, value in points]
    last = max(row["step"] for rows in runs.values() for row in rows)
    ticks = _log_ticks(min(values), max(values))
    low, high = math.log10(ticks[0]), math.log10(ticks[-1])

    def x(step: float) -> float:
        return round(PLOT["left"] + (PLOT["right"] - PLOT["left"]) * step / last, 1)

    def y(value: float) -> float:
        return round(PLOT["bottom"] - (PLOT["bottom"] - PLOT["top"]) * (math.log10(value) - low) / (high - low), 1)

    title, explanation = CURVES[key]
    return {
        "title": title,
        "explanation": explanation,
        "last": f"{last:g}",
        "plot": PLOT,
        "ticks": [(y(tick), f"{tick:g}") for tick in _labelled(ticks)],
        "lines": {name: " ".join(f"{x(s)},{y(v)}" for s, v in points) for name, points in averaged.items()},
    }


def student_cycles(runs: Mapping[str, list[dict]]) -> str:
    """Sentence that names the cycle of each student: the one that training chose, or the last."""
    chosen = {name: [int(row["best_step"]) for row in rows if row.get("best_step")] for name, rows in runs.items()}
    if not any(chosen.values()):
        return "Both students come from their last cycle."
    last = {name: [rows[-1]["step"]] for name, rows in runs.items()}
    cycles = [f"{name} comes from cycle {(chosen[name] or last[name])[-1]}" for name in runs]
    return (
        f"{', '.join(cycles)}. If that is not the last cycle, training chose it among the measured cycles with at "
        "least train.watch.diversity_floor of the teacher's diversity: the teacher corrects its pictures least."
    )


def _teacher_history(runs: Mapping[str, list[dict]]) -> list[dict]:
    """The teacher's measurements from the last student's history, under the students' keys."""
    return [
        {"step": row["step"], **{name: row.get(f"{name}_teacher") for name in CURVES}} for row in [*runs.values()][-1]
    ]


def _averaged(rows: Sequence[dict], key: str, num_points: int) -> list[tuple[float, float]]:
    """Positive values as (step, value), averaged in bins of equal size if there are more than `num_points`."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) and row[key] > 0]
    width = math.ceil(len(points) / num_points) or 1
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(s for s, _ in bin_) / len(bin_), sum(v for _, v in bin_) / len(bin_)) for bin_ in bins]


def _log_ticks(low: float, high: float) -> list[float]:
    """Numbers of the series 1, 2, 5, 10 from the last below `low` to the first above `high`."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    steps = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    below = max(step for step in steps if step <= low)
    above = min(step for step in steps if step >= high and step > below)
    return [step for step in steps if below <= step <= above]


def _labelled(ticks: list[float]) -> list[float]:
    """Ticks with a label: all of them, or only the powers of ten if there are more than five."""
    return ticks if len(ticks) <= 5 else [tick for tick in ticks if f"{tick:e}".startswith("1.0")]
