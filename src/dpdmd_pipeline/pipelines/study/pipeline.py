"""Wiring of the study."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.study.figure import draw_study
from dpdmd_pipeline.pipelines.study.nodes import run_study, write_study


def create_pipeline(**kwargs) -> Pipeline:
    """Train many students, for the options that the paper varies; make a table and a plot."""
    inputs = ["prompts", "embeddings", "anchors", "teacher", "train_state"]
    options = ["params:backbone", "params:anchors", "params:train", "params:evaluate", "params:study"]
    return Pipeline(
        [
            Node(run_study, [*inputs, *options], "study", name="run_study"),
            Node(write_study, "study", "study_table", name="write_study"),
            Node(draw_study, "study", "study_plot", name="draw_study"),
        ]
    )
