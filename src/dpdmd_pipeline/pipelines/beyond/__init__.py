"""Stage `beyond`: the study of options that the paper does not vary."""

from dpdmd_pipeline.pipelines.beyond.pipeline import create_pipeline as create_pipeline
