"""The main job: all stages from prompts to export."""

from dpdmd_pipeline.pipelines.distill.pipeline import create_pipeline

__all__ = ["create_pipeline"]
