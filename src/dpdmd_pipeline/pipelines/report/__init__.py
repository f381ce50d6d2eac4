"""Stage `report`: the results on one page."""

from dpdmd_pipeline.pipelines.report.pipeline import create_pipeline as create_pipeline
