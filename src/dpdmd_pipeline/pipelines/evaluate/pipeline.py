"""Wiring of the evaluate stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.evaluate.nodes import (
    draw_grids,
    judged_prompts,
    lay_out_pictures,
    say_what_is_missing,
    score_images,
    summarise,
)
from dpdmd_pipeline.pipelines.evaluate.sampling import sample_images


def create_pipeline(**kwargs) -> Pipeline:
    """students and teacher to images, to scores, to metrics, grids and pictures."""
    models = ["prompts", "embeddings", "teacher", "student_dmd", "student", "params:backbone", "params:evaluate"]
    measured = ["metric_weights", "shapes_clip", "params:evaluate"]
    drawn = ["images", "judged_prompts"]
    grids = ["grid_teacher", "grid_dmd", "grid_dp_dmd"]
    return Pipeline(
        [
            Node(judged_prompts, ["prompts", "params:evaluate"], "judged_prompts", name="judged_prompts"),
            Node(say_what_is_missing, measured, None, name="say_what_is_missing"),
            Node(sample_images, ["judged_prompts", *models], "images", name="sample_images"),
            Node(score_images, [*drawn, "score_state", *measured], "scores", name="score_images"),
            Node(summarise, ["images", "scores", "params:evaluate"], "metrics", name="summarise"),
            Node(draw_grids, [*drawn, "params:evaluate"], grids, name="draw_grids"),
            Node(lay_out_pictures, [*drawn, "params:evaluate"], "pictures", name="lay_out_pictures"),
        ]
    )
