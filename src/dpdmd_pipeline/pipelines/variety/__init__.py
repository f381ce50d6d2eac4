"""Stage `variety`: a collapsed student, started by the teacher or with noise in its prompt, beside DP-DMD."""

from dpdmd_pipeline.pipelines.variety.pipeline import create_pipeline as create_pipeline
