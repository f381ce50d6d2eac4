"""Wiring of the main job."""

from kedro.pipeline import Pipeline

from dpdmd_pipeline.pipelines import anchors, evaluate, export, prompts, report, train


def create_pipeline(**kwargs) -> Pipeline:
    """Sum of prompts, anchors, train, evaluate, report and export; the trained teacher is an input."""
    return sum((stage.create_pipeline() for stage in (prompts, anchors, train, evaluate, report, export)), Pipeline([]))
