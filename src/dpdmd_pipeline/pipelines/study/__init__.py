"""Stage `study`: many recipes and seeds on one cache, with mean and spread."""

from dpdmd_pipeline.pipelines.study.pipeline import create_pipeline

__all__ = ["create_pipeline"]
