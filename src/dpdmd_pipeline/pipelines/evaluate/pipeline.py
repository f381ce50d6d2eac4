"""Wiring of the evaluate stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.evaluate.nodes import draw_grids, judged_prompts, measure, sample_images


def create_pipeline(**kwargs) -> Pipeline:
    """students and teacher to images, to metrics and grids."""
    models = ["prompts", "embeddings", "teacher", "student_dmd", "student", "params:backbone", "params:evaluate"]
    judged = ["images", "judged_prompts", "params:evaluate"]
    grids = ["grid_teacher", "grid_dmd", "grid_dp_dmd"]
    return Pipeline(
        [
            Node(judged_prompts, ["prompts", "params:evaluate"], "judged_prompts", name="judged_prompts"),
            Node(sample_images, ["judged_prompts", *models], "images", name="sample_images"),
            Node(measure, judged, "metrics", name="measure"),
            Node(draw_grids, judged, grids, name="draw_grids"),
        ]
    )
