"""Lay out the scores per prompt and the attributes of the pictures for SVG."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dpdmd_pipeline.pipelines.report.wording import MODELS, first_common

# Axes of the scatter: the first figure that all models have, of the exact reader if possible.
_QUALITY = ("quality.shapes.aligned", "quality.", "preference.", "alignment.")
_DIVERSITY = ("diversity.shapes.effective_modes", "diversity.")
PLOT = {"left": 56, "right": 552, "top": 12, "bottom": 300}  # in an image of 560 x 340
BARS = {"left": 96, "right": 344, "top": 6, "bar": 6, "row": 25}  # in an image 360 wide


def make_scatter(scores: Mapping[str, Any]) -> dict[str, Any] | None:
    """One point per prompt and model, diversity on the x axis and quality on the y axis; None if one is missing."""
    scatter = scatter_points(scores)
    if scatter is None:
        return None
    x_name, y_name, points = scatter
    x_marks, y_marks = (_ticks(min(column), max(column)) for column in list(zip(*points, strict=True))[1:3])
    x = partial(_position, x_marks, PLOT["left"], PLOT["right"])
    y = partial(_position, y_marks, PLOT["bottom"], PLOT["top"])
    return {
        "x_name": x_name,
        "y_name": y_name,
        "plot": PLOT,
        "x_ticks": [(x(tick), f"{tick:g}") for tick in x_marks],
        "y_ticks": [(y(tick), f"{tick:g}") for tick in y_marks],
        "points": {
            model: [(x(right), y(up), text) for owner, right, up, text in points if owner == model] for model in MODELS
        },
    }


def scatter_points(scores: Mapping[str, Any]) -> tuple[str, str, list[tuple[str, float, float, str]]] | None:
    """Names of a diversity and a quality that all models have, and (model, diversity, quality, text) of each prompt."""
    tables = {model: scores["models"][model]["per_prompt"] for model in MODELS}
    x_name, y_name = (first_common(tables, prefixes) for prefixes in (_DIVERSITY, _QUALITY))
    if x_name is None or y_name is None:
        return None
    points = [
        (model, table[x_name][key], table[y_name][key], scores["prompts"][key])
        for model, table in tables.items()
        for key in table[x_name]
        if key in table[y_name]
    ]
    return (x_name, y_name, points) if points else None


def prompt_table(scores: Mapping[str, Any], max_prompts: int) -> dict[str, Any] | None:
    """The scatter as a table of the first prompts, with quality and diversity by model."""
    scatter = scatter_points(scores)
    if scatter is None:
        return None
    x_name, y_name, points = scatter
    rows: dict[str, dict[str, str]] = {}
    for model, x, y, text in points:
        rows.setdefault(text, {})[model] = f"{y:.3g} / {x:.3g}"
    return {"x_name": x_name, "y_name": y_name, "rows": list(rows.items())[:max_prompts], "of": len(rows)}


def _position(marks: Sequence[float], start: float, end: float, value: float) -> float:
    """Coordinate of a value on an axis whose first and last marks lie at `start` and `end`."""
    return round(start + (end - start) * (value - marks[0]) / (marks[-1] - marks[0]), 1)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span `low` to `high`."""
    if low == high:
        low, high = low - abs(low) / 10 - 1e-9, high + abs(high) / 10 + 1e-9
    rough = (high - low) / 5
    power = 10 ** math.floor(math.log10(rough))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(number * step, 12) for number in range(first, last + 1)]


def make_bars(attributes: Mapping[str, Mapping[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """One panel per free attribute: for each value a bar per model, the share of the model's correct pictures."""
    first = next(iter(attributes.values()), {})
    return [_panel(name, {model: attributes[model][name] for model in attributes}) for name in first]


def _panel(name: str, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    words = list(next(iter(counts.values())))
    shares = {model: _shares(of_model) for model, of_model in counts.items()}
    largest = max(share for of_model in shares.values() for share in of_model.values()) or 1
    width, height = BARS["right"] - BARS["left"], BARS["row"] * len(words)

    def length(share: float) -> float:
        return round(width * share / largest, 1)

    return {
        "title": name,
        "plot": BARS,
        "height": BARS["top"] + height,
        "labels": [(BARS["top"] + BARS["row"] * row + 14, word) for row, word in enumerate(words)],
        "bars": {
            model: [
                (
                    BARS["top"] + BARS["row"] * row + BARS["bar"] * number,
                    length(of_model[word]),
                    f"{100 * of_model[word]:.1f} %",
                )
                for row, word in enumerate(words)
            ]
            for number, (model, of_model) in enumerate(shares.items())
        },
        "even": BARS["left"] + length(1 / len(words)),
        "even_share": f"{100 / len(words):.0f} %",
        "largest": f"{100 * largest:.0f} %",
    }


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Share of each value; 0 for a model without a correct picture."""
    total = sum(counts.values())
    return {word: count / total if total else 0.0 for word, count in counts.items()}
