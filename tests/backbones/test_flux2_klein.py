"""Special to FLUX.2 Klein: packed and normalised latents, layers of a language model, a shift by size and steps."""

import math

import pytest
import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.flux2_klein import MOST_TOKENS, load

OPTIONS = {"resolution": 32, "max_sequence_length": 100, "level_range": (0.02, 0.98)}


@pytest.fixture(scope="module")
def backbone(tiny_flux2_klein):
    return load(tiny_flux2_klein, **OPTIONS)


@pytest.mark.parametrize("steps", [4, 50])
def test_the_shift_depends_on_the_size_and_the_steps(tiny_flux2_klein, backbone, steps):
    larger = load(tiny_flux2_klein, **OPTIONS | {"resolution": 64})
    for model, tokens in ((backbone, 64), (larger, 256)):
        assert model.latent_shape == (16, math.isqrt(tokens), math.isqrt(tokens))
        shift = math.exp(compute_empirical_mu(tokens, steps))
        second = (1 - 1 / steps) * shift / (1 + (shift - 1) * (1 - 1 / steps))
        assert model.schedule(steps).sigma[1].item() == pytest.approx(second, rel=1e-5)
        assert model.shift == pytest.approx(math.exp(compute_empirical_mu(tokens, 50)))


def test_positions_are_those_of_the_pipeline(backbone):
    latents, embeds = torch.zeros(1, 16, 3, 5), torch.zeros(1, 7, 96)
    assert torch.equal(backbone._positions(1, 3, 5, 1), Flux2KleinPipeline._prepare_latent_ids(latents)[0])
    assert torch.equal(backbone._positions(1, 1, 1, 7), Flux2KleinPipeline._prepare_text_ids(embeds)[0])


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"is_distilled": True}, ["is_distilled", "klein-base"]),
        ("transformer/config.json", {"guidance_embeds": True}, ["guidance_embeds", "FLUX.2-dev"]),
    ],
)
def test_a_few_step_or_guidance_distilled_model_is_known_by_its_config(tiny_flux2_klein, edited, file, values, words):
    fact = load(edited(tiny_flux2_klein, file, **values), **OPTIONS).distilled()
    assert all(word in fact for word in words)


def test_a_base_model_is_a_teacher(backbone):
    assert backbone.distilled() is None


def test_a_text_encoder_of_another_width_is_refused(tiny_flux2_klein, edited):
    with refuses(ValueError, "64", "32", "text encoder"):
        load(edited(tiny_flux2_klein, "text_encoder/config.json", hidden_size=64), **OPTIONS)


@pytest.mark.parametrize(
    "options, words", [({"resolution": 34}, ["34", "4"]), ({"max_sequence_length": 513}, ["513", str(MOST_TOKENS)])]
)
def test_options_that_do_not_fit_are_refused(tiny_flux2_klein, options, words):
    with refuses(ValueError, f"backbone.{next(iter(options))}", *words):
        load_backbone("flux2_klein", tiny_flux2_klein, **OPTIONS | options)
