"""Wiring of the prompts stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts


def create_pipeline(**kwargs) -> Pipeline:
    """Clean the prompt files, report on them, and encode the prompts."""
    files = ["raw_prompts", "raw_eval_prompts", "params:prompts"]
    inputs = ["prompts", "teacher", "params:backbone", "params:prompts"]
    return Pipeline(
        [
            Node(clean_prompts, files, ["prompts", "prompts_report"], name="clean_prompts"),
            Node(encode_prompts, inputs, "embeddings", name="encode_prompts"),
        ]
    )
