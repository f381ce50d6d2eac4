"""Stage `report`: what came out, in one page to look at."""

from dpdmd_pipeline.pipelines.report.pipeline import create_pipeline

__all__ = ["create_pipeline"]
