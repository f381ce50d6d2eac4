"""The picture of the study: a row per run, a dot per student."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdmd_pipeline.pipelines.study.nodes import SHOWN, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"effective_modes": "effective modes (diversity)", "aligned": "aligned (quality)"}
# Okabe and Ito's, which colour-blind people tell apart
TURN_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00")
LOOKS = (  # of the lines over what is varied
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#009E73", "marker": "s", "linestyle": ":"},
)
_TEACHER = {"color": "black", "linestyle": "--", "linewidth": 1.2}
_MEAN = {"marker": "|", "s": 190, "linewidths": 3}
_SEED = {"s": 34, "alpha": 0.75, "edgecolors": "white", "linewidths": 0.6}
_BASELINE = {"marker": "D", "s": 26, "facecolors": "none", "edgecolors": "0.65"}


class Row(NamedTuple):
    """One run as it is drawn.

    Attributes:
        values: by metric, one per training seed.
        baseline: the run it is compared with; its own name where it is a baseline.
        turns: of the student.
        colour: of its number of turns.
    """

    name: str
    values: dict[str, list]
    baseline: str
    turns: int
    colour: str


class Sweep(NamedTuple):
    """What was varied by itself.

    Attributes:
        lines: by label, the values by metric at each place.
    """

    title: str
    lines: dict[str, dict[float, dict[str, list]]]


def draw_study(study: dict[str, Any]) -> Any:
    """A figure: diversity and quality of every run in the table's order, and over what was varied by itself."""
    from matplotlib.figure import Figure

    rows = rows_of(study)
    sweeps = [sweep for sweep in (weight_sweep(study), steps_sweep(study)) if any(map(_is_line, sweep.lines.values()))]
    height = max(1.7 + 0.3 * len(rows), 6.0 if sweeps else 0.0)
    figure = Figure(figsize=(9.5 + 1.9 * len(sweeps), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    grid = figure.add_gridspec(2, 2 + len(sweeps), width_ratios=[3, 2, *([1.7] * len(sweeps))])
    modes = figure.add_subplot(grid[:, 0])
    aligned = figure.add_subplot(grid[:, 1], sharey=modes)
    for axis, metric in ((modes, "effective_modes"), (aligned, "aligned")):
        _draw_rows(axis, rows, metric)
        axis.axvline(_teacher(study, metric), **_TEACHER, label="teacher")
    _draw_baselines(modes, rows)
    _name_rows(modes, aligned, rows)
    for place, sweep in enumerate(sweeps, 2):
        _draw_sweep(figure.add_subplot(grid[0, place]), figure.add_subplot(grid[1, place]), sweep, study)
    figure.suptitle("One dot per training seed, a bar at their mean")
    figure.legend(*_legend(modes), loc="outside lower center", ncols=5, frameon=False)
    return figure


def rows_of(study: dict[str, Any]) -> list[Row]:
    """The runs in the table's order."""
    found = summarise(study)
    turns = {run: {**study["defaults"], **study["runs"][run].get("train", {})}["max_steps"] for run in found}
    kinds = list(dict.fromkeys(turns.values()))
    colours = {run: TURN_COLOURS[kinds.index(turns[run]) % len(TURN_COLOURS)] for run in found}
    baselines = {run: study["runs"][run].get("baseline", study["baseline"]) for run in found}
    return [Row(run, values, baselines[run], turns[run], colours[run]) for run, values in found.items()]


def weight_sweep(study: dict[str, Any]) -> Sweep:
    """The paper's ablation: over the diversity weight, with the stop-gradient and without.

    A run belongs if it changes nothing else.
    """
    labels = {True: "stop-gradient", False: "no stop-gradient"}
    lines: dict[str, dict[float, dict[str, list]]] = {label: {} for label in labels.values()}
    for run, values in summarise(study).items():
        changes = study["runs"][run]
        recipe = {**study["defaults"], **changes.get("train", {})}
        if changes.get("train", {}).keys() <= {"diversity_weight", "stop_gradient"} and not changes.get("anchors"):
            lines[labels[recipe["stop_gradient"]]][recipe["diversity_weight"]] = values
    return Sweep("diversity weight", lines)


def steps_sweep(study: dict[str, Any]) -> Sweep:
    """Over K, the teacher's steps before the anchor. All these anchors are drawn online, the default's too."""
    line = {}
    for run, values in summarise(study).items():
        changes = study["runs"][run]
        level = changes.get("anchors", {}).get("anchor_levels", [{"steps": study["defaults"]["steps"]}])[0]
        if changes.get("anchors") and not changes.get("train") and level.get("steps"):
            line[level["steps"]] = values
    return Sweep("K, anchors online", {"DP-DMD": line})


def _is_line(line: dict[float, dict[str, list]]) -> bool:
    return len(line) > 1


def _teacher(study: dict[str, Any], metric: str) -> float:
    return study["teacher"][SHOWN[metric]][metric]["value"]


def _draw_rows(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """A line of dots per run, the first at the top."""
    for place, row in enumerate(rows):
        values = row.values[metric]
        if place % 2:
            axis.axhspan(place - 0.5, place + 0.5, color="0.955", linewidth=0, zorder=0)  # leads the eye across
        axis.scatter([mean(values)], [place], color=row.colour, **_MEAN, zorder=3)
        axis.scatter(values, [place] * len(values), color=row.colour, **_SEED, zorder=4, label=f"{row.turns} turns")
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


def _draw_sweep(top: Axes, bottom: Axes, sweep: Sweep, study: dict[str, Any]) -> None:
    for axis, metric in zip((top, bottom), TITLES, strict=True):
        _draw_lines(axis, sweep, metric)
        axis.axhline(_teacher(study, metric), **_TEACHER)
    bottom.set_xlabel(sweep.title)
    if sum(map(bool, sweep.lines.values())) > 1:
        # between the panels, where no dot is
        top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False)


def _draw_lines(axis: Axes, sweep: Sweep, metric: str) -> None:
    """A line over the means, and the seeds' dots; two lines a little apart, so that neither hides the other."""
    ticks = sorted({place for line in sweep.lines.values() for place in line})
    apart = 0.03 * (ticks[-1] - ticks[0]) * (len(sweep.lines) > 1)
    for (label, line), look, shift in zip(sweep.lines.items(), LOOKS, (-apart, apart), strict=False):
        means = [(place + shift, mean(line[place][metric])) for place in sorted(line)]
        seeds = [(place + shift, value) for place in line for value in line[place][metric]]
        if line:
            axis.plot(*zip(*means, strict=True), **look, markersize=8, label=label)
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
