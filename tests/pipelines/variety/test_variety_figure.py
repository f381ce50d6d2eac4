"""The figure shows every run at its number of evaluations, in the series of its start."""

import io
from statistics import mean

from tests.pipelines.study.test_figure import DMD, judged

from dpdmd_pipeline.pipelines.study.nodes import summarise
from dpdmd_pipeline.pipelines.variety.figure import LABELS, draw_variety, points_of

RUNS = {
    "dmd": {**DMD, "evaluations": 4},
    "dp_dmd": {"evaluations": 4},
    "start_3": {**DMD, "teacher_start": {"steps": 3, "landing": 1}, "evaluations": 9},
    "start_7": {**DMD, "teacher_start": {"steps": 7, "landing": 1}, "evaluations": 17},
    "unguided_3": {**DMD, "teacher_start": {"steps": 3, "landing": 1, "guidance_scale": 1.0}, "evaluations": 6},
    "second_4": {**DMD, "teacher_start": {"steps": 4, "landing": 2}, "evaluations": 10},
    "noise_3": {**DMD, "prompt_noise": {"strength": 3.0}, "evaluations": 4},
}


def made_study():
    students = [(name, seed, number + 10 * seed) for seed in (0, 1) for number, name in enumerate(RUNS, 1)]
    rows = [{"run": name, "seed": seed, **judged(0.9 + value / 1000, float(value))} for name, seed, value in students]
    teacher = {**judged(0.97, 30.0), "evaluations": 60}
    return {"baseline": "dmd", "runs": RUNS, "defaults": {}, "teacher": teacher, "rows": rows}


def test_every_run_is_a_point_of_one_series():
    series = {point.name: point.label for point in points_of(made_study())}
    assert series == {
        "teacher": "teacher",
        "dmd": "students alone",
        "dp_dmd": "students alone",
        "start_3": "guided start, first level",
        "start_7": "guided start, first level",
        "unguided_3": "unguided start, first level",
        "second_4": "guided start, second level",
        "noise_3": "noise in the prompt",
    }
    assert set(series.values()) <= set(LABELS)


def test_the_panels_show_the_means_over_evaluations():
    figure = draw_variety(made_study())
    figure.savefig(io.BytesIO(), format="png")
    summary = summarise(made_study())
    for axis, metric in zip(figure.axes, ("effective_modes", "aligned"), strict=True):
        drawn = {tuple(point) for line in axis.get_lines() for point in line.get_xydata().tolist()}
        for name, run in RUNS.items():
            assert (run["evaluations"], mean(summary[name][metric])) in drawn, name
        assert {"DMD", "DP-DMD"} <= {text.get_text() for text in axis.texts}
