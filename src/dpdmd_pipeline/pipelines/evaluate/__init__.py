"""Stage `evaluate`: the same prompts and seeds through teacher, DMD and DP-DMD, judged."""

from dpdmd_pipeline.pipelines.evaluate.pipeline import create_pipeline

__all__ = ["create_pipeline"]
