"""Figure of the study of starts: diversity and quality over network evaluations."""

from __future__ import annotations

from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdmd_pipeline.pipelines.study.figure import TITLES
from dpdmd_pipeline.pipelines.study.nodes import figure_value, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LABELS = {  # series, in the order of the legend, with colours by Okabe and Ito and a marker
    "teacher": ("black", "*"),
    "students alone": ("#D55E00", "D"),
    "guided start, first level": ("#0072B2", "o"),
    "unguided start, first level": ("#56B4E9", "o"),
    "guided start, second level": ("#009E73", "s"),
    "unguided start, second level": ("#8FD1B8", "s"),
    "noise in the prompt": ("#999999", "x"),
}
_NAMES = {"dmd": "DMD", "dp_dmd": "DP-DMD"}  # written beside the points


class Point(NamedTuple):
    """One run."""

    label: str  # series
    name: str
    evaluations: int
    values: dict[str, list]  # one value per training seed, by metric


def points_of(study: dict[str, Any]) -> list[Point]:
    """Every run as a point of its series, and the teacher."""
    teacher = {metric: [figure_value(study["teacher"], metric)] for metric in TITLES}
    points = [Point("teacher", "teacher", study["teacher"]["evaluations"], teacher)]
    for run, values in summarise(study).items():
        points.append(Point(_series(study["runs"][run]), run, study["runs"][run]["evaluations"], values))
    return points


def _series(changes: dict[str, Any]) -> str:
    """Label of a run's series."""
    if "prompt_noise" in changes:
        return "noise in the prompt"
    if start := changes.get("teacher_start"):
        guidance = "unguided" if start.get("guidance_scale") == 1 else "guided"
        return f"{guidance} start, {'first' if start['landing'] == 1 else 'second'} level"
    return "students alone"


def draw_variety(study: dict[str, Any]) -> Any:
    """Draw effective modes and alignment of every run over its network evaluations, the mean over the seeds."""
    from matplotlib.figure import Figure

    points = points_of(study)
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, TITLES, strict=True):
        for label, (colour, marker) in LABELS.items():
            _draw_series(axis, [point for point in points if point.label == label], metric, label, colour, marker)
        axis.axhline(mean(points[0].values[metric]), color="0.8", linewidth=1, zorder=0)
        axis.set(xlabel="network evaluations for a picture", title=TITLES[metric], xscale="log")
        ticks = [4, 6, 10, 17, points[0].evaluations]
        axis.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
        axis.set_xticks([], minor=True)
        axis.set_xlim(left=2.6)
        axis.grid(color="0.93")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylim(bottom=0)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_series(axis: Axes, points: list[Point], metric: str, label: str, colour: str, marker: str) -> None:
    """Means joined by a line where evaluations differ, with bars from the lowest to the highest seed."""
    if not points:
        return
    x = [point.evaluations for point in points]
    y = [mean(point.values[metric]) for point in points]
    spread = [[middle - min(p.values[metric]) for middle, p in zip(y, points, strict=True)]]
    spread.append([max(p.values[metric]) - middle for middle, p in zip(y, points, strict=True)])
    line = "-" if len(set(x)) > 1 else "none"
    axis.errorbar(x, y, yerr=spread, color=colour, marker=marker, linestyle=line, capsize=2, label=label)
    for point, height in zip(points, y, strict=True):
        if name := _NAMES.get(point.name):
            words = {"textcoords": "offset points", "ha": "right", "va": "center", "color": colour}
            axis.annotate(name, (point.evaluations, height), (-8, 0), **words)
