"""Wiring of the evaluate stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.evaluate import nodes
from dpdmd_pipeline.pipelines.evaluate.sampling import sample_images


def create_pipeline(**kwargs) -> Pipeline:
    """Draw with the teacher and both students, score the images, and make metrics, grids and pictures."""
    models = ["prompts", "embeddings", "teacher", "student_dmd", "student", "params:backbone", "params:evaluate"]
    scoring = ["metric_weights", "shapes_clip", "params:evaluate"]
    pictures = ["images", "judged_prompts"]
    grids = ["grid_teacher", "grid_dmd", "grid_dp_dmd"]
    return Pipeline(
        [
            Node(nodes.judged_prompts, ["prompts", "params:evaluate"], "judged_prompts", name="judged_prompts"),
            Node(nodes.warn_about_missing_weights, scoring, None, name="say_what_is_missing"),
            Node(sample_images, ["judged_prompts", *models], "images", name="sample_images"),
            Node(nodes.score_images, [*pictures, "score_state", *scoring], "scores", name="score_images"),
            Node(nodes.make_metrics, ["images", "scores", "params:evaluate"], "metrics", name="summarise"),
            Node(nodes.make_summary, "metrics", "summary", name="condense"),
            Node(nodes.draw_grids, [*pictures, "params:evaluate"], grids, name="draw_grids"),
            Node(nodes.lay_out_pictures, [*pictures, "params:evaluate"], "pictures", name="lay_out_pictures"),
        ]
    )
