"""Nodes of the report stage."""

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpdmd_pipeline.pipelines.report.options import ReportOptions

MODELS = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD"}
DASH = "\N{EM DASH}"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "kedro", "kedro-datasets", "dvc")


@dataclass(frozen=True)
class Metric:
    """How a metric is called, written and explained."""

    title: str
    explanation: str
    digits: int = 3
    percent: bool = False
    unit: str = ""

    def number(self, value: float) -> str:
        """`93.1 %`, `4.21`."""
        return f"{100 * value:.{self.digits}f} %" if self.percent else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """With the unit: `93.1 %`, `4.21 bits`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def interval(self, measured: Mapping[str, float]) -> str:
        """`91.0 to 95.2`, without the unit."""
        low, high = (self.text(measured[end]).split()[0] for end in ("low", "high"))
        return f"{low} to {high}"


METRICS = {
    "valid": Metric(
        "valid",
        "Share of pictures in which the reader finds exactly one clean object of the world.",
        digits=1,
        percent=True,
    ),
    "aligned": Metric(
        "aligned",
        "Share of pictures that are valid and show the colour and shape that the prompt names.",
        digits=1,
        percent=True,
    ),
    "residual": Metric(
        "residual",
        "Distance of a picture from the nearest perfect one, RMS per pixel; 0 is perfect, less is better.",
    ),
    "effective_modes": Metric(
        "effective modes",
        "How many equally likely kinds of picture would make two seeds agree as often as these do; 1 means that every "
        "seed gives the same.",
        digits=1,
    ),
    "coverage": Metric(
        "coverage",
        "Share of all kinds of picture a prompt allows that were drawn at least once; with few pictures a prompt even "
        "a perfect model misses some.",
        digits=1,
        percent=True,
    ),
    "entropy": Metric(
        "entropy",
        "Surprise at the kind of picture the next seed gives; 0 bits when it is always the same.",
        digits=2,
        unit="bits",
    ),
    "pairwise_distance": Metric(
        "pairwise distance",
        "Mean difference between any two pictures of a prompt, RMS per pixel; needs no reader, but blur and noise "
        "move it too.",
    ),
}
CURVES = {
    "dmd_loss": ("DMD loss", "The pull towards what the teacher finds likely; it need not fall."),
    "diversity_loss": ("Diversity loss", "Distance of DP-DMD's anchored steps from the teacher's; DMD has none."),
    "fake_score_loss": ("Fake-score loss", "How well the second network follows the changing student."),
    "grad_ratio": ("Gradient ratio", "Weighted diversity gradient over DMD gradient; near 1 they are in balance."),
}


def make_report(
    metrics: dict[str, Any],
    prompts: Iterable[dict],
    train_history: list[dict],
    train_history_dmd: list[dict],
    grid_teacher: Any,
    grid_dmd: Any,
    grid_dp_dmd: Any,
    options: ReportOptions,
    **stage_options: Any,
) -> tuple[str, str]:
    """One page as HTML and as Markdown; the same inputs and versions give the same bytes.

    Args:
        metrics: of the three models.
        prompts: the evaluation ones label the rows of the grids, in their order.
        train_history, train_history_dmd: rows of step and losses.
        grid_teacher, grid_dmd, grid_dp_dmd: PIL images, a row per evaluation prompt, all of equal height.
        options: of this stage.
        stage_options: of the other stages, `<stage>_options`: plain, or as the models that their own nodes ask for.

    Returns:
        report.html, which needs no other file, and report.md, which shows the pictures beside it.

    Raises:
        ValueError: if a grid does not divide into the evaluation prompts.
    """
    texts = [" ".join(record["text"].split()) for record in prompts if record["eval"]]
    grids = {"teacher": grid_teacher, "dmd": grid_dmd, "dp_dmd": grid_dp_dmd}
    groups = {name.removesuffix("_options"): plain_options(group) for name, group in stage_options.items()}
    strips = [cut_strips(name, grid, len(texts), options) for name, grid in grids.items()]
    runs = {"dmd": train_history_dmd, "dp_dmd": train_history}
    page = {
        "verdict": make_verdict(metrics),
        "captions": make_captions(metrics),
        "models": MODELS,
        "metrics": metrics,
        "rows": table_rows(metrics),
        "gaps_missing": None in metrics["dp_dmd"]["gap_recovered"].values(),
        "prompts": texts,
        "pictures": [(text, dict(zip(MODELS, row, strict=True))) for text, *row in zip(texts, *strips, strict=False)],
        "curves": [curve for key in CURVES if (curve := make_curve(key, runs, options.curve_points))],
        "options": option_tables({**groups, "report": plain_options(options)}),
        "versions": versions(),
        "dash": DASH,
    }
    return _render("report.html.j2", page), _render("report.md.j2", page)


def show_result(metrics: dict[str, Any], report_html: str, report_md: str) -> None:
    """Print the result; takes the reports only to come after them."""
    from rich import box
    from rich.console import Console

    screen = Console()
    # piped, it must neither be cut to 80 columns nor hold boxes
    console = screen if screen.is_terminal else Console(width=120)
    console.print(_result_table(metrics, box.SIMPLE if console.is_terminal else None))
    if None in metrics["dp_dmd"]["gap_recovered"].values():
        console.print("-: DMD lost nothing in this, so there is no gap to recover", soft_wrap=True)
    console.print(make_verdict(metrics), style="bold", markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _result_table(metrics: dict[str, Any], box: Any) -> Any:
    from rich.table import Table

    table = Table(box=box, pad_edge=False, collapse_padding=True)
    kinds = [(kind, name) for kind in ("quality", "diversity") for name in metrics["teacher"][kind]]
    measured = [(kind, name) for kind, name in kinds if name != "residual"]
    table.add_column("", no_wrap=True)
    for metric in (_metric(name) for _, name in measured):
        table.add_column(f"{metric.title}, {metric.unit}" if metric.unit else metric.title, justify="right")
    table.add_column("NFE", justify="right")
    for model, title in MODELS.items():
        values = [_metric(name).number(metrics[model][kind][name]["value"]) for kind, name in measured]
        table.add_row(title, *values, str(metrics[model]["nfe"]))
    gaps = metrics["dp_dmd"]["gap_recovered"]
    table.add_row("gap recovered", *(_gap(gaps[name], "-") if name in gaps else "" for _, name in measured), "")
    return table


# ---- words and numbers


def make_verdict(metrics: dict[str, Any]) -> str:
    """The result in one sentence, whichever way it went; what the intervals cannot tell apart is called so."""
    return f"{_diversity_clause(metrics)}{_validity_clause(metrics)}."


def _diversity_clause(metrics: dict[str, Any]) -> str:
    teacher, dmd, ours = (metrics[model]["diversity"]["effective_modes"] for model in MODELS)
    gap = metrics["dp_dmd"]["gap_recovered"]["effective_modes"]
    modes = [METRICS["effective_modes"].text(measured["value"]) for measured in (ours, dmd, teacher)]
    numbers = "{} effective modes a prompt against DMD's {} and the teacher's {}".format(*modes)
    if gap is None:
        return f"DMD lost no diversity here, so there was none for DP-DMD to recover: {numbers}"
    if dmd["high"] >= teacher["low"]:
        return f"DMD's loss of diversity cannot be told from chance here, nor what DP-DMD recovers of it: {numbers}"
    if gap <= 0:
        return f"DP-DMD does not recover the diversity that DMD lost: {numbers}"
    if ours["low"] <= dmd["high"]:
        return f"DP-DMD does not measurably recover the diversity that DMD lost: {numbers}"
    share = "all" if gap >= 1 else f"{'' if gap >= 0.5 else 'only '}{_gap(gap)}"
    return f"DP-DMD recovers {share} of the diversity that DMD lost: {numbers}"


def _validity_clause(metrics: dict[str, Any]) -> str:
    dmd, ours = (metrics[model]["quality"]["valid"] for model in ("dmd", "dp_dmd"))
    of = METRICS["valid"].text
    numbers = f"{of(ours['value'])} against {of(dmd['value'])}"
    if ours["value"] >= dmd["value"]:
        return f"; DP-DMD's pictures are valid no less often than DMD's, {numbers}"
    if ours["high"] >= dmd["low"]:
        return f"; DP-DMD's pictures are valid a little less often than DMD's, within the uncertainty, {numbers}"
    return f", but DP-DMD's pictures are valid less often than DMD's, {numbers}"


def make_captions(metrics: dict[str, Any]) -> dict[str, str]:
    """What stands under each model's pictures."""
    captions = {model: f"{title}, {metrics[model]['nfe']}" for model, title in MODELS.items()}
    return {**captions, "teacher": f"{captions['teacher']} network evaluations"}


def table_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric: title, explanation, a (value, interval) per model, and the gap recovered where it has one."""
    gaps = metrics["dp_dmd"]["gap_recovered"]
    return [
        {
            "title": _metric(name).title,
            "explanation": _metric(name).explanation,
            "cells": [
                (_metric(name).text(measured["value"]), _metric(name).interval(measured))
                for measured in (metrics[model][kind][name] for model in MODELS)
            ],
            "gap": _gap(gaps[name]) if name in gaps else None,
        }
        for kind in ("quality", "diversity")
        for name in metrics["teacher"][kind]
    ]


def _metric(name: str) -> Metric:
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def _gap(value: float | None, missing: str = DASH) -> str:
    return missing if value is None else f"{100 * value:.0f} %"


# ---- pictures


def cut_strips(model: str, grid: Any, num_prompts: int, options: ReportOptions) -> list[str]:
    """The first rows of a grid, each as a data URI of a PNG.

    Raises:
        ValueError: if the grid's height is no multiple of the number of prompts.
    """
    if not num_prompts or grid.height % num_prompts:
        raise ValueError(
            f"grid_{model} is {grid.height} pixels high and cannot show {num_prompts} evaluation prompts, one a row: "
            "run `kedro run --pipelines evaluate` again"
        )
    height = grid.height // num_prompts
    rows = range(min(num_prompts, options.max_prompts))
    return [_data_uri(grid.crop((0, row * height, grid.width, (row + 1) * height)), options) for row in rows]


def _data_uri(image: Any, options: ReportOptions) -> str:
    from PIL import Image

    if image.width > options.max_strip_width:
        size = options.max_strip_width, max(1, round(image.height * options.max_strip_width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- curves

PLOT = {"left": 46, "right": 352, "top": 12, "bottom": 170}  # in a picture of 360 x 196


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


# ---- options and versions


def plain_options(group: Any) -> dict[str, str]:
    """Dotted names and values as text, sorted.

    The line's other pipelines ask for typed options, so in one run with them a group comes as a model and
    alone as a dict: both give the same here.
    """
    if hasattr(group, "model_dump"):
        group = group.model_dump(mode="json", exclude_unset=True)
    return dict(sorted(_flat("", group)))


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from _flat(f"{name} {number}", inner)
    else:
        yield name, ", ".join(map(_scalar, value)) if isinstance(value, list | tuple) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)  # as YAML has it


def option_tables(groups: Mapping[str, dict[str, str]]) -> list[dict[str, Any]]:
    """A table per stage; the two students side by side, with what differs marked."""
    tables = []
    for name, group in groups.items():
        if name == "train_dmd":
            continue
        columns = {"DP-DMD": group, "DMD": groups["train_dmd"]} if name == "train" else {"": group}
        keys = sorted({key for column in columns.values() for key in column})
        rows = [(key, [column.get(key, DASH) for column in columns.values()]) for key in keys]
        tables.append({
            "name": name,
            "columns": list(columns),
            "rows": [{"name": key, "values": values, "differs": len(set(values)) > 1} for key, values in rows],
        })  # fmt: skip
    return tables


def versions() -> dict[str, str]:
    """What this was made with."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from dpdmd_pipeline import __version__

    found = {"dpdmd-pipeline": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # a wheel may come without
            found[package] = "not installed"
    return {**found, "platform": platform.platform()}


# ---- pages


def _render(template: str, page: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("dpdmd_pipeline.pipelines.report", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    return environment.get_template(template).render(page)


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it stands, in a paragraph, a list or a cell of a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+])(?=\s|$)", lambda m: f"{m[1] or ''}\\{m[2] or m[3]}", text)
