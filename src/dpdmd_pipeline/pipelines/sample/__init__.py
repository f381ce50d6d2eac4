"""Stage `sample`: pictures from an export."""

from dpdmd_pipeline.pipelines.sample.pipeline import create_pipeline as create_pipeline
