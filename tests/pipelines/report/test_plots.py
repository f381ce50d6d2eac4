"""DVC draws the rows for `dvc plots`."""

import json
from pathlib import Path

import pytest
import yaml
from tests.pipelines.report.conftest import made_history, made_scores

from dpdmd_pipeline.pipelines.report.nodes import make_plots
from dpdmd_pipeline.wording import COLOURS

ROOT = Path(__file__).parents[3]
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
TEXTS = ("a red circle", "a blue square")
MODELS = ("teacher", "DMD", "DP-DMD")


def series(name, rows):
    """Points (x, y) of each column of one of dvc.yaml's plots, by DVC's own code."""
    from dvc.render.converter.vega import VegaConverter

    (properties,) = (plot[title] for plot in DVC["plots"] for title in plot if name in plot[title]["y"])
    points, axes = VegaConverter("plot", {name: rows}, properties).flat_datapoints("workspace")
    columns = {field: [] for field in properties["y"][name]}
    for point in points:
        columns[point["field"]].append((point[axes["x"]], point[axes["y"]]))
    return {field: [(x, y) for x, y in column if y is not None] for field, column in columns.items()}


def test_dvc_draws_the_dmd_loss_of_both_students_although_some_cycles_have_more_measurements():
    losses, *_ = make_plots(made_scores(TEXTS), made_history(1.0), made_history(0.0))
    columns = series("data/08_reporting/plot_losses.json", losses)
    assert columns == dict.fromkeys(("DMD", "DP-DMD"), [(step, 0.3) for step in range(1, 121)])


def test_dvc_draws_the_diversity_of_both_students_and_of_the_teacher_during_training():
    _, watched, _ = make_plots(made_scores(TEXTS), made_history(1.0), made_history(0.0))
    columns = series("data/08_reporting/plot_watched.json", watched)
    assert list(columns) == list(MODELS)
    steps = (25, 50, 75, 100)
    assert columns["DMD"] == columns["DP-DMD"] == [(step, 1.0) for step in steps]
    assert columns["teacher"] == [(step, 1.2) for step in steps]


def test_students_that_were_measured_at_other_cycles_have_their_own_points():
    later = [row | {"step": row["step"] + 10} for row in made_history(1.0)]
    _, watched, _ = make_plots(made_scores(TEXTS), later, made_history(0.0))
    columns = series("data/08_reporting/plot_watched.json", watched)
    assert [step for step, _ in columns["DMD"]] == [25, 50, 75, 100]
    assert [step for step, _ in columns["DP-DMD"]] == [35, 60, 85, 110]


def test_dvc_draws_quality_against_diversity_prompt_by_prompt():
    scores = made_scores(TEXTS)
    *_, prompts = make_plots(scores, made_history(1.0), made_history(0.0))
    assert {row["prompt"] for row in prompts} == set(TEXTS) and len(prompts) == 6
    assert {row["quality_is"] for row in prompts} == {"quality.shapes.aligned"}
    columns = series("data/08_reporting/plot_prompts.json", prompts)
    for model, column in zip(("teacher", "dmd", "dp_dmd"), MODELS, strict=True):
        table = scores["models"][model]["per_prompt"]
        expected = zip(*(table[name].values() for name in sorted(table)), strict=True)
        assert sorted(columns[column]) == sorted(expected)


@pytest.mark.parametrize("plot", DVC["plots"], ids=lambda plot: next(iter(plot)))
def test_every_chart_of_dvc_is_drawn_in_the_colours_of_the_report(plot):
    from dvc.render.converter.vega import VegaConverter
    from dvc_render.vega import VegaRenderer

    ((title, properties),) = plot.items()
    (file,) = properties["y"]
    names = {"plot_losses.json": 0, "plot_watched.json": 1, "plot_prompts.json": 2}
    rows = make_plots(made_scores(TEXTS), made_history(1.0), made_history(0.0))[names[Path(file).name]]
    points, properties = VegaConverter("plot", {file: rows}, properties).flat_datapoints("workspace")
    chart = VegaRenderer(points, title, template_dir=ROOT / ".dvc/plots", **properties).get_filled_template()
    scale = chart["encoding"]["color"]["scale"]
    assert dict(zip(scale["domain"], scale["range"], strict=True)) == COLOURS
    assert len(chart["data"]["values"]) == len(points) and "'" not in title
    assert "<DVC" not in json.dumps(chart)


@pytest.mark.parametrize("attributes", [True, False])
def test_missing_measurements_give_no_rows(attributes):
    history = [{"step": 1, "dmd_loss": 0.3}]
    _, watched, prompts = make_plots(made_scores(TEXTS, attributes=attributes), history, history)
    assert watched == [] and bool(prompts) == attributes
