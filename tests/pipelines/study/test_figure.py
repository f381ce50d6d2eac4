"""The figure shows every run and every seed, and the options that vary alone."""

import io

import pytest

from dpdmd_pipeline.pipelines.study.figure import draw_study, rows_of, steps_sweep, weight_sweep
from dpdmd_pipeline.pipelines.study.nodes import summarise

DMD = {"train": {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}}
LONG = {"train": {**DMD["train"], "max_steps": 200}, "baseline": "dmd_200"}
DEFAULTS = {"diversity_weight": 2.0, "max_steps": 100, "stop_gradient": True, "steps": 8}
RUNS = {
    "dmd": DMD,
    "lambda_3": {"train": {"diversity_weight": 3.0}},
    "dp_dmd": {},
    "lambda_1": {"train": {"diversity_weight": 1.0}},
    "open_1": {"train": {"diversity_weight": 1.0, "stop_gradient": False}},
    "balanced": {"train": {"diversity_weight": 4.0, "weighting": "balanced"}},
    "online": {"anchors": {"mode": "online"}},
    "later": {"anchors": {"mode": "online", "anchor_levels": [{"steps": 15}]}},
    "nearer": {"anchors": {"mode": "online", "anchor_levels": [{"sigma": 0.7}]}},
    "dmd_200": LONG,
    "lambda_3_200": {"train": {"diversity_weight": 3.0, "max_steps": 200}, "baseline": "dmd_200"},
}


def judged(aligned, modes):
    numbers = {
        "valid": aligned,
        "aligned": aligned,
        "effective_modes": modes,
        "coverage": 0.5,
        "pairwise_distance": 0.3,
    }
    values = {name: {"value": value} for name, value in numbers.items()}
    return {"quality": values, "diversity": values}


def made_study(names=tuple(RUNS)):
    """Two seeds per run, and a different number for each student."""
    students = [(name, seed, number + 10 * seed) for seed in (0, 1) for number, name in enumerate(names, 1)]
    rows = [{"run": name, "seed": seed, **judged(0.9 + value / 1000, float(value))} for name, seed, value in students]
    runs = {name: RUNS[name] for name in names}
    return {"baseline": "dmd", "runs": runs, "defaults": DEFAULTS, "teacher": judged(0.97, 30.0), "rows": rows}


def drawn(study):
    """Panels of the rendered figure."""
    figure = draw_study(study)
    figure.savefig(io.BytesIO(), format="png")
    return figure.axes


def dots(axis):
    """Dots of the seeds, as (value, row)."""
    seeds = [marks for marks in axis.collections if marks.get_label().endswith(" cycles")]
    return {tuple(point) for marks in seeds for point in marks.get_offsets().tolist()}


def test_the_rows_are_the_runs_in_the_order_of_the_table():
    modes, aligned, *_ = drawn(made_study())
    assert [label.get_text() for label in modes.get_yticklabels()] == list(summarise(made_study())) == list(RUNS)
    bottom, top = modes.get_ylim()
    assert bottom > top and aligned.get_ylim() == (bottom, top)


@pytest.mark.parametrize(("panel", "metric"), [(0, "effective_modes"), (1, "aligned")])
def test_every_seed_is_a_dot_in_the_row_of_its_run(panel, metric):
    axis = drawn(made_study())[panel]
    runs = enumerate(summarise(made_study()).values())
    assert dots(axis) == {(value, row) for row, values in runs for value in values[metric]}


def test_the_teacher_is_a_line_in_every_panel():
    modes, aligned, *sweeps = drawn(made_study())
    assert [line.get_xdata()[0] for line in (modes.lines[-1], aligned.lines[-1])] == [30.0, 0.97]
    assert [axis.lines[-1].get_ydata()[0] for axis in sweeps] == [30.0, 0.97] * 2


def test_a_row_shows_the_mean_of_the_baseline_that_the_run_names():
    modes, *_ = drawn(made_study())
    (baselines,) = (marks for marks in modes.collections if marks.get_label() == "mean of the run's baseline")
    assert {row: value for value, row in baselines.get_offsets().tolist()} == {
        **dict.fromkeys(range(1, 9), 1 + 5.0), 10: 10 + 5.0
    }  # fmt: skip


def test_runs_with_the_same_number_of_cycles_have_one_colour_and_one_label():
    figure = draw_study(made_study())
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["100 cycles", "200 cycles", "teacher", "mean of the run's baseline"]
    colours = [row.colour for row in rows_of(made_study())]
    assert len(set(colours[:9])) == 1 and len(set(colours[9:])) == 1 and colours[0] != colours[9]


def test_the_weight_sweep_has_only_runs_without_other_changes():
    lines = weight_sweep(made_study()).lines
    assert {label: sorted(line) for label, line in lines.items()} == {
        "stop-gradient": [1.0, 2.0, 3.0], "no stop-gradient": [1.0]
    }  # fmt: skip
    assert lines["stop-gradient"][2.0]["effective_modes"] == [3.0, 13.0]


def test_the_sweep_over_k_has_only_runs_with_online_anchors():
    (line,) = steps_sweep(made_study()).lines.values()
    assert {steps: values["effective_modes"] for steps, values in line.items()} == {8: [7.0, 17.0], 15: [8.0, 18.0]}
    *_, modes, aligned = drawn(made_study())
    assert list(modes.get_xticks()) == [8, 15] and aligned.get_xlabel() == "K, anchors online"


def test_a_study_of_two_runs_has_no_sweeps():
    assert len(drawn(made_study(("dmd", "dp_dmd")))) == 2
