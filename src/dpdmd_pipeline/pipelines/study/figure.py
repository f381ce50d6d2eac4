"""Figure of the study: a row per run, a dot per student."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

from dpdmd_pipeline.pipelines.study.nodes import figure_value, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TITLES = {"effective_modes": "effective modes (diversity)", "aligned": "aligned (quality)"}
# colours by Okabe and Ito, which colour-blind people can distinguish
CYCLE_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00")
LOOKS = (  # lines of the sweeps
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#009E73", "marker": "s", "linestyle": ":"},
)
_TEACHER = {"color": "black", "linestyle": "--", "linewidth": 1.2}
_MEAN = {"marker": "|", "s": 190, "linewidths": 3}
_SEED = {"s": 34, "alpha": 0.75, "edgecolors": "white", "linewidths": 0.6}
_BASELINE = {"marker": "D", "s": 26, "facecolors": "none", "edgecolors": "0.65"}


class Row(NamedTuple):
    """One run of the figure."""

    name: str
    values: dict[str, list]  # one value per training seed, by metric
    baseline: str  # its own name for a baseline
    cycles: int  # of the training of its students
    colour: str  # of this number of cycles


class Sweep(NamedTuple):
    """Runs that vary one option alone."""

    title: str
    lines: dict[str, dict[float, dict[str, list]]]  # label, value of the option, metric -> one value per seed


def draw_study(study: dict[str, Any]) -> Any:
    """Draw diversity and quality of every run, in the order of the table, and over each option that varies alone."""
    from matplotlib.figure import Figure

    rows = rows_of(study)
    sweeps = [sweep for sweep in (weight_sweep(study), steps_sweep(study)) if max(map(len, sweep.lines.values())) > 1]
    height = max(1.7 + 0.3 * len(rows), 6.0 if sweeps else 0.0)
    figure = Figure(figsize=(9.5 + 1.9 * len(sweeps), height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.08)
    grid = figure.add_gridspec(2, 2 + len(sweeps), width_ratios=[3, 2, *([1.7] * len(sweeps))])
    modes = figure.add_subplot(grid[:, 0])
    aligned = figure.add_subplot(grid[:, 1], sharey=modes)
    for axis, metric in ((modes, "effective_modes"), (aligned, "aligned")):
        _draw_rows(axis, rows, metric)
        axis.axvline(figure_value(study["teacher"], metric), **_TEACHER, label="teacher")
    means = {row.name: mean(row.values["effective_modes"]) for row in rows}
    compared = {number: means[row.baseline] for number, row in enumerate(rows) if row.baseline != row.name}
    modes.scatter(list(compared.values()), list(compared), **_BASELINE, zorder=2, label="mean of the run's baseline")
    modes.set_yticks(range(len(rows)), [row.name for row in rows])
    modes.set_ylim(len(rows) - 0.5, -0.5)
    modes.set_xlim(left=0)
    modes.tick_params(axis="y", length=0)
    aligned.tick_params(axis="y", length=0, labelleft=False)
    for column, sweep in enumerate(sweeps, 2):
        _draw_sweep(figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column]), sweep, study)
    figure.suptitle("One dot per training seed, a bar at their mean")
    handles = dict(zip(*reversed(modes.get_legend_handles_labels()), strict=True))  # each label once
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=5, frameon=False)
    return figure


def rows_of(study: dict[str, Any]) -> list[Row]:
    """Runs in the order of the table."""
    rows, colours = [], {}
    for run, values in summarise(study).items():
        changes = study["runs"][run]
        cycles = changes.get("train", {}).get("max_steps", study["defaults"]["max_steps"])
        colour = colours.setdefault(cycles, CYCLE_COLOURS[len(colours) % len(CYCLE_COLOURS)])
        rows.append(Row(run, values, changes.get("baseline", study["baseline"]), cycles, colour))
    return rows


def weight_sweep(study: dict[str, Any]) -> Sweep:
    """The paper's ablation: the diversity weight, with the stop-gradient and without.

    Runs with other changes do not count.
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
    """K, the number of teacher steps before the anchor; all runs draw their anchors online, the default K too."""
    line = {}
    for run, values in summarise(study).items():
        changes = study["runs"][run]
        level = changes.get("anchors", {}).get("anchor_levels", [{"steps": study["defaults"]["steps"]}])[0]
        if changes.get("anchors") and not changes.get("train") and level.get("steps"):
            line[level["steps"]] = values
    return Sweep("K, anchors online", {"DP-DMD": line})


def _draw_rows(axis: Axes, rows: Sequence[Row], metric: str) -> None:
    """A line of dots per run, the first at the top."""
    for number, row in enumerate(rows):
        values = row.values[metric]
        if number % 2:
            axis.axhspan(number - 0.5, number + 0.5, color="0.955", linewidth=0, zorder=0)  # stripes guide the eye
        axis.scatter([mean(values)], [number], color=row.colour, **_MEAN, zorder=3)
        axis.scatter(values, [number] * len(values), color=row.colour, **_SEED, zorder=4, label=f"{row.cycles} cycles")
    axis.set_xlabel(TITLES[metric])
    axis.locator_params(axis="x", nbins=6)  # more labels would touch
    axis.grid(axis="x", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_sweep(top: Axes, bottom: Axes, sweep: Sweep, study: dict[str, Any]) -> None:
    for axis, metric in zip((top, bottom), TITLES, strict=True):
        _draw_lines(axis, sweep, metric)
        axis.axhline(figure_value(study["teacher"], metric), **_TEACHER)
    bottom.set_xlabel(sweep.title)
    if sum(map(bool, sweep.lines.values())) > 1:
        # between the panels, clear of the dots
        top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), frameon=False)


def _draw_lines(axis: Axes, sweep: Sweep, metric: str) -> None:
    """A line through the means, and a dot per seed; two lines are shifted, so that neither hides the other."""
    ticks = sorted({x for line in sweep.lines.values() for x in line})
    offset = 0.03 * (ticks[-1] - ticks[0]) * (len(sweep.lines) > 1)
    for (label, line), look, shift in zip(sweep.lines.items(), LOOKS, (-offset, offset), strict=False):
        means = [(x + shift, mean(line[x][metric])) for x in sorted(line)]
        seeds = [(x + shift, value) for x in line for value in line[x][metric]]
        if line:
            axis.plot(*zip(*means, strict=True), **look, markersize=8, label=label)
            axis.scatter(*zip(*seeds, strict=True), color=look["color"], marker=look["marker"], **_SEED)
    axis.set_title(TITLES[metric], fontsize="medium")
    axis.set_xticks(ticks)
    axis.margins(x=0.12)
    axis.grid(axis="y", color="0.9")
    axis.spines[["top", "right"]].set_visible(False)
