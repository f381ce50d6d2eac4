"""Wiring of the study, also under other names with other runs."""

from collections.abc import Callable
from typing import Any

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.study.figure import draw_study
from dpdmd_pipeline.pipelines.study.nodes import run_study, write_study


def create_pipeline(**kwargs) -> Pipeline:
    """Train many students, for the options that the paper varies; make a table and a plot."""
    return _study(draw_study)


def create_named_study(name: str, draw: Callable[[dict[str, Any]], Any] = draw_study) -> Pipeline:
    """The study with the runs of the parameter group `name`, whose datasets also begin with `name`."""
    study = _study(draw)
    inputs = study.inputs()
    options = {entry for entry in inputs if entry.startswith("params:")}
    return Pipeline(
        study,
        namespace=name,
        inputs=inputs - options,
        parameters={**{entry: entry for entry in options}, "params:study": f"params:{name}"},
        outputs={"study": name, "study_table": f"{name}_table", "study_plot": f"{name}_plot"},
    )


def _study(draw: Callable[[dict[str, Any]], Any]) -> Pipeline:
    inputs = ["prompts", "embeddings", "anchors", "teacher", "train_state"]
    options = ["params:backbone", "params:anchors", "params:train", "params:evaluate", "params:study"]
    return Pipeline(
        [
            Node(run_study, [*inputs, *options], "study", name="run_study"),
            Node(write_study, "study", "study_table", name="write_study"),
            Node(draw, "study", "study_plot", name="draw_study"),
        ]
    )
