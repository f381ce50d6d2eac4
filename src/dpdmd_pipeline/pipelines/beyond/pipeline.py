"""Wiring of the study beyond the paper."""

from kedro.pipeline import Pipeline

from dpdmd_pipeline.pipelines.study.pipeline import create_named_study


def create_pipeline(**kwargs) -> Pipeline:
    """The nodes of the study, with other runs."""
    return create_named_study("beyond")
