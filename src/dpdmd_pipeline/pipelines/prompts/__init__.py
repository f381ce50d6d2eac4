"""Stage `prompts`: files of prompts become clean records, and each is encoded once."""

from dpdmd_pipeline.pipelines.prompts.pipeline import create_pipeline

__all__ = ["create_pipeline"]
