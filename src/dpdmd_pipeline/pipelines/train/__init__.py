"""Stage `train`: the DP-DMD student, and the DMD baseline by the same code."""

from dpdmd_pipeline.pipelines.train.pipeline import create_pipeline as create_pipeline
