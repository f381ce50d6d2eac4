"""Stage `study`: train many recipes and seeds on one cache; report mean and spread."""

from dpdmd_pipeline.pipelines.study.pipeline import create_pipeline as create_pipeline
