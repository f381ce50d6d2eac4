"""Wiring of the clip stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.clip.nodes import judge_clip, train_embedded_clip


def create_pipeline(**kwargs) -> Pipeline:
    """Train the embedded world's CLIP, and measure how well it finds captions."""
    return Pipeline(
        [
            Node(train_embedded_clip, ["clip_state", "params:clip"], "shapes_clip", name="train_clip"),
            Node(judge_clip, "shapes_clip", "clip_metrics", name="judge_clip"),
        ]
    )
