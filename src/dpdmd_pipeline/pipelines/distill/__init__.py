"""The main job: the sum of the stages, from prompts to report."""

from dpdmd_pipeline.pipelines.distill.pipeline import create_pipeline

__all__ = ["create_pipeline"]
