"""Data of the page's drawings: scores per prompt, attributes of the pictures, curves of the training."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from dpdmd_pipeline.pipelines.report.wording import CURVES, MODELS, first_common
from dpdmd_pipeline.wording import grouped

# Axes of the scatter: the first figure that all models have, of the exact reader if possible.
_QUALITY = ("quality.shapes.aligned", "quality.", "preference.", "alignment.")
_DIVERSITY = ("diversity.shapes.effective_modes", "diversity.")
CURVE = {"left": 46, "right": 352, "top": 12, "bottom": 170}  # in an image of 360 x 196


# ---- scores per prompt


def make_scatter(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """One point per prompt and model, diversity on the x axis and quality on the y axis; None if one is missing."""
    x_name, y_name, points = scatter_points(scores)
    if not points:
        return None
    x_ticks, y_ticks = (_ticks(point[axis] for point in points) for axis in (1, 2))
    by_model = grouped((model, point) for model, *point in points)
    return {"x_name": x_name, "y_name": y_name, "x_ticks": x_ticks, "y_ticks": y_ticks, "points": by_model}


def scatter_points(scores: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, float, float, str]]]:
    """Names of a diversity and a quality that all models have, and (model, diversity, quality, text) of each prompt."""
    tables = {model: scores["models"][model]["per_prompt"] for model in MODELS}
    x_name, y_name = (first_common(tables, prefixes) for prefixes in (_DIVERSITY, _QUALITY))
    if x_name is None or y_name is None:
        return "", "", []
    points = [
        (model, table[x_name][key], table[y_name][key], scores["prompts"][key])
        for model, table in tables.items()
        for key in table[x_name]
        if key in table[y_name]
    ]
    return (x_name, y_name, points) if points else ("", "", [])


def prompt_table(scores: Mapping[str, Any], max_prompts: int) -> dict[str, Any] | None:
    """The scatter as a table of the first prompts, with quality and diversity by model."""
    x_name, y_name, points = scatter_points(scores)
    rows: dict[str, dict[str, str]] = {}
    for model, x, y, text in points:
        rows.setdefault(text, {})[model] = f"{y:.3g} / {x:.3g}"
    shown = list(rows.items())[:max_prompts]
    return {"x_name": x_name, "y_name": y_name, "rows": shown, "of": len(rows)} if rows else None


def _ticks(values: Iterable[float]) -> list[float]:
    """About five round numbers that span the values."""
    from matplotlib.ticker import MaxNLocator

    values = list(values)
    return MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(min(values), max(values)).tolist()


# ---- attributes of the pictures


def make_bars(attributes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """One panel per free attribute: for each value the share of each model's correct pictures."""
    panels = []
    for name, words in next(iter(attributes.values()), {}).items():
        counts = {model: list(of_model[name].values()) for model, of_model in attributes.items()}
        # 0 for a model without a correct picture
        shares = {model: [count / (sum(row) or 1) for count in row] for model, row in counts.items()}
        largest = max(map(max, shares.values())) or 1
        panels.append({"title": name, "words": list(words), "shares": shares, "largest": largest})
    return panels


# ---- curves of the training


def make_curves(runs: Mapping[str, list[dict]], num_points: int) -> list[dict[str, Any]]:
    """One panel per entry of CURVES with positive values; the teacher's measurements are in the last history."""
    *_, last = runs.values()
    teacher = [{"step": row["step"], **{name: row.get(f"{name}_teacher") for name in CURVES}} for row in last]
    runs = {**runs, "teacher": teacher}
    return [curve for key in CURVES if (curve := make_curve(key, runs, num_points))]


def make_curve(key: str, runs: Mapping[str, list[dict]], num_points: int) -> dict[str, Any] | None:
    """One panel with a logarithmic axis, ready to draw; None if no run has a positive value."""
    averaged = {name: points for name, rows in runs.items() if (points := _averaged(rows, key, num_points))}
    if not averaged:
        return None
    values = [value for points in averaged.values() for _, value in points]
    last = max(row["step"] for rows in runs.values() for row in rows)
    ticks = _log_ticks(min(values), max(values))
    labels = ticks if len(ticks) <= 5 else [tick for tick in ticks if f"{tick:e}".startswith("1.0")]  # powers of ten
    x = partial(_position, (0, last), CURVE["left"], CURVE["right"])
    y = partial(_position, [*map(math.log10, ticks)], CURVE["bottom"], CURVE["top"])
    title, explanation = CURVES[key]
    return {
        "title": title,
        "explanation": explanation,
        "last": f"{last:g}",
        "plot": CURVE,
        "ticks": [(y(math.log10(tick)), f"{tick:g}") for tick in labels],
        "lines": {name: " ".join(f"{x(s)},{y(math.log10(v))}" for s, v in points) for name, points in averaged.items()},
    }


def _position(marks: Sequence[float], start: float, end: float, value: float) -> float:
    """Coordinate of a value on an axis whose first and last marks lie at `start` and `end`."""
    return round(start + (end - start) * (value - marks[0]) / (marks[-1] - marks[0]), 1)


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
