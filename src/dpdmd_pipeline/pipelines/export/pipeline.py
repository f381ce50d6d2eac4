"""Wiring of the export stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.export.nodes import export_student


def create_pipeline(**kwargs) -> Pipeline:
    """Export the student as files for other programs."""
    inputs = ["student", "teacher", "metrics", "params:backbone", "params:export", "run_arguments"]
    return Pipeline([Node(export_student, inputs, "export", name="export_student")])
