"""Wiring of the prompts stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts


def create_pipeline(**kwargs) -> Pipeline:
    return Pipeline(
        [
            Node(
                clean_prompts,
                ["raw_prompts", "raw_eval_prompts", "params:prompts"],
                ["prompts", "prompts_report"],
                name="clean_prompts",
            ),
            Node(
                encode_prompts,
                ["prompts", "teacher", "params:backbone", "params:prompts"],
                "embeddings",
                name="encode_prompts",
            ),
        ]
    )
