"""Stage `prompts`: clean the prompt files and encode each prompt once."""

from dpdmd_pipeline.pipelines.prompts.pipeline import create_pipeline as create_pipeline
