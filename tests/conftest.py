"""Fixtures that many tests share."""

import pytest
import torch


@pytest.fixture(scope="session")
def world_teacher(tmp_path_factory):
    """An untrained StableDiffusion3Pipeline directory of the embedded world's sizes; treat it as read-only."""
    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("world") / "teacher"
    make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """The same with a smaller transformer, trained in a third of the time; treat it as read-only."""
    from diffusers import SD3Transformer2DModel

    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    pipeline = make_pipeline(max_length=12, shift=1.0, seed=0)
    smaller = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "caption_projection_dim": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline.register_modules(transformer=SD3Transformer2DModel.from_config(pipeline.transformer.config, **smaller))
    pipeline.save_pretrained(folder)
    return folder
