"""Wiring of the train stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.train.nodes import draw_curves, train_student


def create_pipeline(**kwargs) -> Pipeline:
    """anchors to two students, their histories and one picture of both."""
    common = ["prompts", "embeddings", "anchors", "teacher", "train_state", "params:backbone", "params:anchors"]
    return Pipeline(
        [
            Node(train_student, [*common, "params:train_dmd"], ["student_dmd", "train_history_dmd"], name="train_dmd"),
            Node(train_student, [*common, "params:train"], ["student", "train_history"], name="train_student"),
            Node(draw_curves, ["train_history", "train_history_dmd"], "train_curve", name="draw_curves"),
        ]
    )
