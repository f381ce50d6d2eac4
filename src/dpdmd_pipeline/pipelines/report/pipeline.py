"""Wiring of the report stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.report.nodes import make_plots, make_report, show_result


def create_pipeline(**kwargs) -> Pipeline:
    """Make a page, rows for `dvc plots`, and a table in the terminal."""
    results = ["metrics", "scores", "prompts", "train_history", "train_history_dmd"]
    grids = ["grid_teacher", "grid_dmd", "grid_dp_dmd", "train_strip"]
    options = ["params:report", "params:prompts", "params:evaluate"]
    inputs = [*results, *grids, "student", "student_dmd", *options, "run_arguments"]
    reports = ["report_html", "report_md"]
    rows = ["scores", "train_history", "train_history_dmd"]
    plots = ["plot_losses", "plot_watched", "plot_prompts"]
    return Pipeline(
        [
            Node(make_report, inputs, reports, name="make_report"),
            Node(make_plots, rows, plots, name="make_plots"),
            Node(show_result, ["metrics", *reports], None, name="show_result"),
        ]
    )
