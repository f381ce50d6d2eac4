"""Wiring of the teacher stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.teacher.nodes import judge_teacher, train_embedded_teacher


def create_pipeline(**kwargs) -> Pipeline:
    """Nothing to an embedded teacher, and how good it is."""
    return Pipeline(
        [
            Node(
                train_embedded_teacher,
                ["teacher_state", "params:backbone", "params:teacher"],
                "teacher",
                name="train_teacher",
            ),
            Node(
                judge_teacher, ["teacher", "params:backbone", "params:teacher"], "teacher_metrics", name="judge_teacher"
            ),
        ]
    )
