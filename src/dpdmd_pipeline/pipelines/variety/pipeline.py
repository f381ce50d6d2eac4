"""Wiring of the study of starts."""

from kedro.pipeline import Pipeline

from dpdmd_pipeline.pipelines.study.pipeline import create_named_study
from dpdmd_pipeline.pipelines.variety.figure import draw_variety


def create_pipeline(**kwargs) -> Pipeline:
    """The nodes of the study, with runs that start differently and a figure over evaluations."""
    return create_named_study("variety", draw_variety)
