"""Special to Z-Image: time from noise to picture, a velocity of opposite sign, a chat template, lists of prompts."""

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import guidance_arguments, token_limits
from dpdmd_pipeline.backbones.z_image import ZImage, load
from dpdmd_pipeline.dpdmd.noise import flow_level

OPTIONS = {"resolution": 32, "max_sequence_length": 48, "level_range": (0.02, 0.98)}


@pytest.fixture(scope="module")
def backbone(tiny_z_image):
    return ZImage(tiny_z_image, **OPTIONS)


def noise(seed=0):
    return torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


def test_denoise_is_latents_plus_sigma_times_the_networks_output(backbone):
    model, cond, sigma = backbone.load_model(), backbone.encode(["a", "a red circle"]), torch.tensor([0.8, 0.3])
    lengths = cond["prompt_mask"].sum(1).int().tolist()
    with torch.no_grad():
        output = model(
            [latent[:, None] for latent in noise()],
            1 - sigma,
            [embeds[:length] for embeds, length in zip(cond["prompt_embeds"], lengths, strict=True)],
            return_dict=False,
        )[0]
        x0 = backbone.denoise(model, noise(), flow_level(sigma.view(-1, 1, 1, 1)), cond)
    torch.testing.assert_close(x0, noise() + sigma.view(-1, 1, 1, 1) * torch.cat([o[None, :, 0] for o in output]))


def test_a_prompt_is_truncated_at_the_token_limit_which_counts_the_template(tiny_z_image, backbone):
    from transformers import AutoTokenizer

    ((name, limit),) = token_limits("z_image", tiny_z_image, OPTIONS["max_sequence_length"]).items()
    tokenizer = AutoTokenizer.from_pretrained(tiny_z_image / name)
    (around,) = limit.count(tokenizer, [""])
    texts = ["a" * (limit.tokens - around + more) for more in (-1, 0, 1, 2)]
    assert limit.count(tokenizer, texts) == [limit.tokens + more for more in (-1, 0, 1, 2)]
    assert backbone.encode(texts)["prompt_mask"].sum(1).tolist() == [limit.tokens - 1, *[limit.tokens] * 3]


def test_padding_reaches_no_network(backbone):
    cond, level, model = backbone.encode(["a", "a red circle"]), backbone.schedule(4)[1], backbone.load_model()
    padding = 1 - cond["prompt_mask"]
    assert padding.sum() > 0 and not cond["prompt_embeds"][padding.bool()].any()
    other = {**cond, "prompt_embeds": cond["prompt_embeds"] + padding[..., None]}
    with torch.no_grad():
        assert torch.equal(*(backbone.denoise(model, noise(), level, c) for c in (cond, other)))


def test_the_callers_prompts_stay_as_they_are(backbone):
    prompts = ["a red circle"]
    backbone.encode(prompts)
    assert prompts == ["a red circle"]


def test_the_pipeline_counts_guidance_from_0():
    assert guidance_arguments("z_image", 5.0) == {"guidance_scale": 4.0}
    assert guidance_arguments("sd3", 5.0) == {"guidance_scale": 5.0}


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("scheduler/scheduler_config.json", {"use_dynamic_shifting": True}, ["use_dynamic_shifting"]),
        ("transformer/config.json", {"siglip_feat_dim": 8}, ["siglip_feat_dim"]),
        ("text_encoder/config.json", {"hidden_size": 64}, ["64", "32", "text encoder"]),
    ],
)
def test_a_folder_of_another_kind_is_refused(tiny_z_image, edited, file, values, words):
    with refuses(ValueError, *words):
        load(edited(tiny_z_image, file, **values), **OPTIONS)


@pytest.mark.parametrize("options, multiple", [({"resolution": 36}, "8"), ({"max_sequence_length": 0}, "512")])
def test_options_that_do_not_fit_are_refused(tiny_z_image, options, multiple):
    ((name, value),) = options.items()
    with refuses(ValueError, f"backbone.{name}", str(value), multiple):
        load(tiny_z_image, **OPTIONS | options)


def test_a_turbo_scheduler_shows_a_few_step_student(tiny_z_image, edited, backbone):
    assert backbone.distilled() is None
    turbo = load(edited(tiny_z_image, "scheduler/scheduler_config.json", shift=3.0), **OPTIONS)
    assert "Turbo" in turbo.distilled()
