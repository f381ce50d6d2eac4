"""Stage `report`: the results on one page."""

from dpdmd_pipeline.pipelines.report.pipeline import create_pipeline

__all__ = ["create_pipeline"]
