"""Stage `evaluate`: draw the same prompts and seeds with teacher, DMD and DP-DMD, and score them."""

from dpdmd_pipeline.pipelines.evaluate.pipeline import create_pipeline as create_pipeline
