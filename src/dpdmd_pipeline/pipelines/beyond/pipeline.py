"""Wiring of the study beyond the paper."""

from kedro.pipeline import Pipeline

from dpdmd_pipeline.pipelines.study.pipeline import study_of


def create_pipeline(**kwargs) -> Pipeline:
    """anchors to a table and a plot of many students: the study again, of other runs."""
    return study_of("beyond")
