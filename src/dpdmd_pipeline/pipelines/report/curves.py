"""Curves of the histories, laid out to be drawn as SVG."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

CURVES = {
    "dmd_loss": ("DMD loss", "The pull towards what the teacher finds likely; it need not fall."),
    "diversity_loss": ("Diversity loss", "Distance of DP-DMD's anchored steps from the teacher's; DMD has none."),
    "fake_score_loss": ("Fake-score loss", "How well the second network follows the changing student."),
    "latent_diversity": (
        "Diversity while training",
        "Distance between one prompt's latents; it falls as variety is lost.",
    ),
    "correction": ("Quality while training", "What the teacher changes of a latent under noise; less is better."),
    "grad_ratio": ("Gradient ratio", "Weighted diversity gradient over DMD gradient; near 1 they are in balance."),
}
PLOT = {"left": 46, "right": 352, "top": 12, "bottom": 170}  # in a picture of 360 x 196


def make_curves(runs: Mapping[str, list[dict]], num_points: int) -> list[dict[str, Any]]:
    """A panel per entry of CURVES that has something to draw."""
    runs = {**runs, "teacher": _of_teacher(runs)}
    return [curve for key in CURVES if (curve := make_curve(key, runs, num_points))]


def make_curve(key: str, runs: Mapping[str, list[dict]], num_points: int) -> dict[str, Any] | None:
    """One panel on a logarithmic axis, ready to draw; None where no run has a positive value of this."""
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


def kept_turns(runs: Mapping[str, list[dict]]) -> str:
    """Which turn each student is of: where one was chosen by what was watched, that one."""
    best = {name: int(turns[-1]) for name, rows in runs.items() if (turns := _chosen(rows))}
    if not best:
        return "Both students are those of their last turn."
    kept = [f"{name} is that of turn {best.get(name, rows[-1]['step'])}" for name, rows in runs.items()]
    return (
        f"{', '.join(kept)}. Where it is not the last: of the measured turns whose diversity is at least "
        "train.watch.diversity_floor of the teacher's, the one whose pictures the teacher corrects least."
    )


def _chosen(rows: Sequence[dict]) -> list[float]:
    return [row["best_step"] for row in rows if row.get("best_step")]


def _of_teacher(runs: Mapping[str, list[dict]]) -> list[dict]:
    """Rows of what was measured of the teacher beside the last of the students, under the students' names of it."""
    measured = ((row["step"], {name: row.get(f"{name}_teacher") for name in CURVES}) for row in [*runs.values()][-1])
    return [{"step": step, **of_teacher} for step, of_teacher in measured]


def _averaged(rows: Sequence[dict], key: str, num_points: int) -> list[tuple[float, float]]:
    """(step, value) of the positive values, in bins of equally many where there are more than `num_points`."""
    points = [(row["step"], row[key]) for row in rows if row.get(key) and row[key] > 0]
    width = math.ceil(len(points) / num_points) or 1
    bins = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(s for s, _ in bin_) / len(bin_), sum(v for _, v in bin_) / len(bin_)) for bin_ in bins]


def _log_ticks(low: float, high: float) -> list[float]:
    """1-2-5 numbers from the last below `low` to the first above `high`."""
    first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
    steps = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    below = max(step for step in steps if step <= low)
    above = min(step for step in steps if step >= high and step > below)
    return [step for step in steps if below <= step <= above]


def _labelled(ticks: list[float]) -> list[float]:
    """All of a few ticks; of many, the powers of ten."""
    return ticks if len(ticks) <= 5 else [tick for tick in ticks if f"{tick:e}".startswith("1.0")]
