"""Wiring of the train stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.train.nodes import draw_curves, train_student
from dpdmd_pipeline.pipelines.train.strip import draw_strip


def create_pipeline(**kwargs) -> Pipeline:
    """Train both students and draw their curves and pictures."""
    inputs = ["prompts", "embeddings", "anchors", "teacher", "train_state"]
    options = ["params:backbone", "params:anchors"]
    dp_dmd = [*inputs, "finished_student", *options, "params:train"]
    dmd = [*inputs, "finished_student_dmd", *options, "params:train_dmd"]
    return Pipeline(
        [
            Node(train_student, dmd, ["student_dmd", "train_history_dmd"], name="train_dmd"),
            Node(train_student, dp_dmd, ["student", "train_history"], name="train_student"),
            Node(draw_curves, ["train_history", "train_history_dmd"], "train_curve", name="draw_curves"),
            Node(draw_strip, ["student_dmd", "student"], "train_strip", name="draw_strip"),
        ]
    )
