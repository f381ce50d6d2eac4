"""The picture of the study: a row per run, a dot per student."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdmd_pipeline.pipelines.study.nodes import SHOWN, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WeightLines = dict[bool, dict[float, dict[str, list]]]  # by stop-gradient and weight, the values by metric

TITLES = {"effective_modes": "effective modes (diversity)", "aligned": "aligned (quality)"}
# Okabe and Ito's, which colour-blind people tell apart
TURN_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00")
LOOKS = {  # of the lines over the weight, by whether the first step is cut off from L_DMD
    True: {"color": "#0072B2", "marker": "o", "linestyle": "-", "label": "stop-gradient"},
    False: {"color": "#009E73", "marker": "s", "linestyle": ":", "label": "no stop-gradient"},
}
_TEACHER = {"color": "black", "linestyle": "--", "linewidth": 1.2}
_MEAN = {"marker": "|", "s": 190, "linewidths": 3}
_SEED = {"s": 34, "alpha": 0.75, "edgecolors": "white", "linewidths": 0.6}
_BASELINE = {"marker": "D", "s": 26, "facecolors": "none", "edgecolors": "0.65"}


class Row(NamedTuple):
    """One run as it is drawn.

    Attributes:
        values: by metric, one per training seed.
        baseline: the run it is compared with; its own name where it is a baseline.
        turns: of the student; None where they are the default and the study does not say which that is.
        colour: of its number of turns.
    """

    name: str
    values: dict[str, list]
    baseline: str
    turns: int | None
    colour: str


def draw_study(study: dict[str, Any]) -> Any:
    """A figure: diversity and quality of every run in the table's order, and over the weight where it was varied."""
    from matplotlib.figure import Figure

    rows, lines = rows_of(study), weight_lines(study)
    height = max(1.7 + 0.3 * len(rows), 6.0 if lines else 0.0)
    figure = Figure(figsize=(11 if lines else 9.5, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    grid = figure.add_gridspec(2, 3 if lines else 2, width_ratios=[3, 2, 1.7] if lines else [3, 2])
    modes = figure.add_subplot(grid[:, 0])
    aligned = figure.add_subplot(grid[:, 1], sharey=modes)
    for axis, metric in ((modes, "effective_modes"), (aligned, "aligned")):
        _draw_rows(axis, rows, metric)
        axis.axvline(_teacher(study, metric), **_TEACHER, label="teacher")
    _draw_baselines(modes, rows)
    _name_rows(modes, aligned, rows)
    if lines:
        _draw_weights(figure.add_subplot(grid[0, 2]), figure.add_subplot(grid[1, 2]), lines, study)
    figure.suptitle("The study: one dot per training seed, a bar at their mean")
    figure.legend(*_legend(modes), loc="outside lower center", ncols=5, frameon=False)
    return figure


def rows_of(study: dict[str, Any]) -> list[Row]:
    """The runs in the table's order."""
    defaults = study.get("defaults", {})  # a study.json of before has none
    found = summarise(study)
    turns = {run: {**defaults, **study["runs"][run].get("train", {})}.get("max_steps") for run in found}
    kinds = list(dict.fromkeys(turns.values()))
    colours = {run: TURN_COLOURS[kinds.index(turns[run]) % len(TURN_COLOURS)] for run in found}
    baselines = {run: study["runs"][run].get("baseline", study["baseline"]) for run in found}
    return [Row(run, values, baselines[run], turns[run], colours[run]) for run, values in found.items()]


def weight_lines(study: dict[str, Any]) -> WeightLines:
    """The paper's ablation: by stop-gradient and diversity weight the values over the seeds.

    A run belongs if it changes nothing else. Empty where no line has two weights.
    """
    lines: WeightLines = {}
    for run, values in summarise(study).items():
        changes = study["runs"][run]
        train = changes.get("train", {})
        recipe = {"stop_gradient": True, **study.get("defaults", {}), **train}
        only_these = train.keys() <= {"diversity_weight", "stop_gradient"} and not changes.get("anchors")
        # the default weight is not known from a study.json of before
        if only_these and "diversity_weight" in recipe:
            lines.setdefault(recipe["stop_gradient"], {})[recipe["diversity_weight"]] = values
    return lines if any(len(line) > 1 for line in lines.values()) else {}


def _teacher(study: dict[str, Any], metric: str) -> float:
    return study["teacher"][SHOWN[metric]][metric]["value"]


def _draw_rows(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """A line of dots per run, the first at the top."""
    for place, row in enumerate(rows):
        values = row.values[metric]
        if place % 2:
            axis.axhspan(place - 0.5, place + 0.5, color="0.955", linewidth=0, zorder=0)  # leads the eye across
        turns = "default turns" if row.turns is None else f"{row.turns} turns"
        axis.scatter([mean(values)], [place], color=row.colour, **_MEAN, zorder=3)
        axis.scatter(values, [place] * len(values), color=row.colour, **_SEED, zorder=4, label=turns)
    axis.set_xlabel(TITLES[metric])
    axis.locator_params(axis="x", nbins=6)  # more of them touch each other
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_baselines(axis: Axes, rows: Sequence[Row]) -> None:
    """In the row of each run, where the run that it is compared with has its mean."""
    means = {row.name: mean(row.values["effective_modes"]) for row in rows}
    compared = {place: means[row.baseline] for place, row in enumerate(rows) if row.baseline != row.name}
    axis.scatter(list(compared.values()), list(compared), **_BASELINE, zorder=2, label="mean of the run's baseline")


def _name_rows(modes: Axes, aligned: Axes, rows: Sequence[Row]) -> None:
    modes.set_yticks(range(len(rows)), [row.name for row in rows])
    modes.set_ylim(len(rows) - 0.5, -0.5)
    modes.set_xlim(left=0)
    modes.tick_params(axis="y", length=0)
    aligned.tick_params(axis="y", length=0, labelleft=False)


def _draw_weights(top: Axes, bottom: Axes, lines: WeightLines, study: dict[str, Any]) -> None:
    for axis, metric in zip((top, bottom), TITLES, strict=True):
        _draw_lines(axis, lines, metric)
        axis.axhline(_teacher(study, metric), **_TEACHER)
    bottom.set_xlabel("diversity weight")
    # between the panels, where no dot is
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False)


def _draw_lines(axis: Axes, lines: WeightLines, metric: str) -> None:
    """A line over the means, and the seeds' dots; the two lines a little apart, so that neither hides the other."""
    ticks = sorted({weight for line in lines.values() for weight in line})
    apart = 0.03 * (ticks[-1] - ticks[0])
    for kept, shift in ((True, -apart), (False, apart)):
        line, look = lines.get(kept, {}), LOOKS[kept]
        means = [(weight + shift, mean(line[weight][metric])) for weight in sorted(line)]
        seeds = [(weight + shift, value) for weight in line for value in line[weight][metric]]
        if line:
            axis.plot(*zip(*means, strict=True), **look, markersize=8)
            axis.scatter(*zip(*seeds, strict=True), color=look["color"], marker=look["marker"], **_SEED)
    axis.set_title(TITLES[metric], fontsize="medium")
    axis.set_xticks(ticks)
    axis.margins(x=0.12)
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)


def _legend(axis: Axes) -> tuple[list, list[str]]:
    """Each label once: every run of as many turns has the same."""
    handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    return list(handles.values()), list(handles)
