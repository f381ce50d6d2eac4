"""The main job: all stages from prompts to export."""

from dpdmd_pipeline.pipelines.distill.pipeline import create_pipeline as create_pipeline
