"""Wiring of the anchors stage."""

from kedro.pipeline import Node, Pipeline

from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors


def create_pipeline(**kwargs) -> Pipeline:
    inputs = ["prompts", "embeddings", "teacher", "params:backbone", "params:anchors", "params:train"]
    return Pipeline([Node(make_anchors, inputs, "anchors", name="make_anchors")])
