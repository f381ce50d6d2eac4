"""Wiring of the study."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.study.figure import draw_study
from dpdmd_pipeline.pipelines.study.nodes import run_study, write_study


def create_pipeline(**kwargs) -> Pipeline:
    """anchors to a table and a plot of many students: what the paper varies."""
    return study_of("study")


def study_of(runs: str) -> Pipeline:
    """The study of a group of runs.

    Args:
        runs: name of the group of options, and of what comes out.
    """
    learned = ["prompts", "embeddings", "anchors", "teacher", "train_state"]
    options = ["params:backbone", "params:anchors", "params:train", "params:evaluate", f"params:{runs}"]
    return Pipeline(
        [
            Node(run_study, [*learned, *options], runs, name=f"run_{runs}"),
            Node(write_study, runs, f"{runs}_table", name=f"write_{runs}"),
            Node(draw_study, runs, f"{runs}_plot", name=f"draw_{runs}"),
        ]
    )
