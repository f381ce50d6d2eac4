"""The demonstration's text encoders and decoder equal diffusers'; other pipelines are refused."""

import json

import pytest
import torch
from comfy_nodes.pipeline import decode_latents, encode_prompt, find_pipeline, list_pipelines
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import load_backbone


def backbone(folder, length=0):
    return load_backbone("sd3", folder, resolution=32, max_sequence_length=length, level_range=(0.02, 0.98))


@pytest.mark.parametrize("text", ["a red circle", "", "Words, that no caption has: " + "blue " * 20])
def test_a_prompt_has_the_embeddings_of_the_training(tiny_teacher, text):
    tokens, pooled = encode_prompt(tiny_teacher, text)
    expected = backbone(tiny_teacher).encode([text])
    torch.testing.assert_close(tokens, expected["prompt_embeds"])
    torch.testing.assert_close(pooled, expected["pooled_embeds"])


def test_latents_have_the_pictures_of_diffusers(tiny_teacher):
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = backbone(tiny_teacher).decode(latents)
    torch.testing.assert_close(decode_latents(tiny_teacher, latents), expected, atol=1e-5, rtol=0)


@pytest.fixture
def pipelines(tmp_path):
    """A folder of pipelines that have an index alone."""

    def add(name, kind, *parts):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        for part in parts:
            (tmp_path / name / part).mkdir()

    add("shapes", "StableDiffusion3Pipeline")
    add("more/large", "StableDiffusion3Pipeline", "text_encoder_3")
    add("xl", "StableDiffusionXLPipeline")
    return [str(tmp_path)]


def test_all_pipelines_are_listed_and_one_is_read(pipelines, tmp_path):
    assert list_pipelines(pipelines) == ["more/large", "shapes", "xl"]
    assert find_pipeline("shapes", pipelines) == tmp_path / "shapes"


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("xl", ("StableDiffusionXLPipeline", "ComfyUI's own")),
        ("more/large", ("with T5",)),
        ("none", ("'none'", "models/diffusers")),
        ("../shapes", ("models/diffusers",)),
    ],
)
def test_a_pipeline_that_cannot_be_read_is_refused(pipelines, name, facts):
    with refuses(ValueError, *facts):
        find_pipeline(name, pipelines)
