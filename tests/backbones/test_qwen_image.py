"""Special to Qwen-Image: packed latents, a template whose beginning is dropped, rescaled guidance, a stretched grid."""

import pytest
import torch
from diffusers import QwenImagePipeline
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import guidance_arguments, load_backbone, token_limits
from dpdmd_pipeline.backbones.qwen_image import MOST_TOKENS, load
from dpdmd_pipeline.dpdmd.noise import flow_level

OPTIONS = {"resolution": 32, "max_sequence_length": 200, "level_range": (0.02, 0.98)}


@pytest.fixture(scope="module")
def backbone(tiny_qwen_image):
    return load(tiny_qwen_image, **OPTIONS)


def test_guidance_keeps_the_length_of_each_tokens_velocity(backbone):
    latents, cond, uncond = (torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(s)) for s in range(3))
    sigma = torch.tensor([0.9, 0.3]).view(-1, 1, 1, 1)
    guided = backbone.guide(cond, uncond, 4.0, latents, flow_level(sigma))
    plain, ours, unscaled = (
        QwenImagePipeline._pack_latents((latents - x0) / sigma, 2, 16, 8, 8)
        for x0 in (cond, guided, uncond + 4.0 * (cond - uncond))
    )
    torch.testing.assert_close(ours.norm(dim=-1), plain.norm(dim=-1))
    torch.testing.assert_close(ours / ours.norm(dim=-1, keepdim=True), unscaled / unscaled.norm(dim=-1, keepdim=True))


def test_the_empty_prompt_is_that_of_the_model_card(backbone):
    assert all(torch.equal(*pair) for pair in zip(*(backbone.encode([p]).values() for p in ("", " ")), strict=True))
    assert guidance_arguments("qwen_image", 4.0) == {"true_cfg_scale": 4.0, "negative_prompt": " "}
    assert guidance_arguments("qwen_image", 1) == {"true_cfg_scale": 1}


def test_a_prompt_is_truncated_at_the_token_limit_which_counts_the_template(tiny_qwen_image, backbone):
    from transformers import AutoTokenizer

    ((name, limit),) = token_limits("qwen_image", tiny_qwen_image, OPTIONS["max_sequence_length"]).items()
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen_image / name)
    (around,) = limit.count(tokenizer, [""])
    texts = ["a" * (limit.tokens - around + more) for more in (-1, 0, 1)]
    assert limit.count(tokenizer, texts) == [limit.tokens + more for more in (-1, 0, 1)]
    assert backbone.encode(texts)["prompt_mask"].sum(1).tolist() == [limit.tokens - 1, limit.tokens, limit.tokens]


def test_padding_reaches_no_network(backbone):
    cond, level, model = backbone.encode(["a", "a red circle"]), backbone.schedule(4)[1], backbone.load_model()
    padding = 1 - cond["prompt_mask"]
    other = {**cond, "prompt_embeds": cond["prompt_embeds"] + padding[..., None]}
    latents = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = (backbone.denoise(model, latents, level, c) for c in (cond, other))
    assert padding.sum() > 0
    torch.testing.assert_close(first, second)


def test_the_teachers_grid_ends_at_the_scheduler_s_terminal(backbone):
    assert backbone.schedule(50).sigma[-2].item() == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"])
def test_a_model_for_another_task_is_refused(tiny_qwen_image, edited, name):
    with refuses(ValueError, name, "text-to-image"):
        load(edited(tiny_qwen_image, "transformer/config.json", **{name: True}), **OPTIONS)


def test_a_guidance_distilled_model_is_known_by_its_config(tiny_qwen_image, edited, backbone):
    assert backbone.distilled() is None
    changed = load(edited(tiny_qwen_image, "transformer/config.json", guidance_embeds=True), **OPTIONS)
    assert "guidance_embeds" in changed.distilled()


def test_a_text_encoder_of_another_width_is_refused(tiny_qwen_image, edited):
    with refuses(ValueError, "64", "32", "text encoder"):
        load(edited(tiny_qwen_image, "text_encoder/config.json", text_config={"hidden_size": 64}), **OPTIONS)


@pytest.mark.parametrize(
    "options, words", [({"resolution": 36}, ["36", "8"]), ({"max_sequence_length": 0}, ["0", str(MOST_TOKENS)])]
)
def test_options_that_do_not_fit_are_refused(tiny_qwen_image, options, words):
    with refuses(ValueError, f"backbone.{next(iter(options))}", *words):
        load_backbone("qwen_image", tiny_qwen_image, **OPTIONS | options)
