"""Wiring of the sample stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.sample.nodes import draw_samples


def create_pipeline(**kwargs) -> Pipeline:
    """Draw pictures from the export, and a grid of them."""
    outputs = ["samples", "grid_samples"]
    return Pipeline([Node(draw_samples, ["export", "teacher", "params:sample"], outputs, name="draw_samples")])
