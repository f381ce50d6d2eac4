"""Wiring of the teacher stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.teacher.nodes import judge_teacher, train_embedded_teacher


def create_pipeline(**kwargs) -> Pipeline:
    """Train the embedded teacher, and judge its pictures."""
    options = ["params:backbone", "params:teacher"]
    return Pipeline(
        [
            Node(train_embedded_teacher, ["teacher_state", *options], "teacher", name="train_teacher"),
            Node(judge_teacher, ["teacher", *options], "teacher_metrics", name="judge_teacher"),
        ]
    )
