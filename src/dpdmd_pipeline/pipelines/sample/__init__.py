"""Stage `sample`: pictures from what the export stage wrote."""

from dpdmd_pipeline.pipelines.sample.pipeline import create_pipeline

__all__ = ["create_pipeline"]
