"""Wiring of the evaluate stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.evaluate.nodes import draw_grids, measure, sample_images


def create_pipeline(**kwargs) -> Pipeline:
    """students and teacher to images, to metrics and grids."""
    drawn = ["prompts", "embeddings", "teacher", "student_dmd", "student", "params:backbone", "params:evaluate"]
    grids = ["grid_teacher", "grid_dmd", "grid_dp_dmd"]
    return Pipeline(
        [
            Node(sample_images, drawn, "images", name="sample_images"),
            Node(measure, ["images", "prompts", "params:evaluate"], "metrics", name="measure"),
            Node(draw_grids, ["images", "prompts", "params:evaluate"], grids, name="draw_grids"),
        ]
    )
