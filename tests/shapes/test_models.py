"""The tiny components are complete: the tokenizer loses no text, networks load, pipelines save and draw."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torchvision.transforms.functional import to_tensor

from dpdmd_pipeline.shapes.models import (
    make_diffusion_scheduler,
    make_pipeline,
    make_sdxl_pipeline,
    make_sdxl_vae,
    make_tokenizer,
    make_transformer,
    make_unet,
    make_vae,
    save_half,
)
from dpdmd_pipeline.shapes.reader import read
from dpdmd_pipeline.shapes.world import RESOLUTION, captions

MAX_LENGTH = 12
ROOT = Path(__file__).parents[2]
WITHOUT_T5 = {"text_encoder_3": None, "tokenizer_3": None}


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(MAX_LENGTH)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = make_pipeline(max_length=MAX_LENGTH, shift=1.0, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def sdxl_pipeline():
    pipeline = make_sdxl_pipeline(max_length=MAX_LENGTH, seed=0)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, output_type, channels, **call):
    return pipeline(
        ["a red circle", "a blue square"],
        num_inference_steps=3,
        guidance_scale=3.5,
        latents=torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0)),
        height=RESOLUTION,
        width=RESOLUTION,
        output_type=output_type,
        **call,
    ).images


def draw_sd3(pipeline, output_type="latent"):
    return draw(pipeline, output_type, 16, max_sequence_length=MAX_LENGTH)


def draw_sdxl(pipeline, output_type="latent"):
    return draw(pipeline, output_type, 4)


# ---- tokenizer


def test_every_caption_comes_back_from_its_tokens(tokenizer):
    for text in captions():
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert len(ids) <= MAX_LENGTH


def test_words_of_captions_are_single_tokens(tokenizer):
    for word in {word for text in captions() for word in text.split()}:
        assert tokenizer.tokenize(word) == [f"{word}</w>"]
    for text in captions():
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == len(text.split())


def test_different_captions_have_different_tokens(tokenizer):
    assert len({tuple(tokenizer(text).input_ids) for text in captions()}) == len(captions())


def byte_of_letter():
    """Inverse of byte-level BPE's alphabet (GPT-2): printable bytes are themselves, others count from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def without_spaces(text: str) -> str:
    return "".join(letter for letter in text if not letter.isspace())


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=40))
@example(text="".join(map(chr, range(1, 256))))
@example(text="\x00")
@example(text="naïve 🙂 日本 a\u0301 ﷽ İ")
@example(text="it's a red's 'll ''''")
def test_no_text_becomes_unknown_and_no_byte_is_lost(tokenizer, text):
    if re.search(r"<\|(start|end)oftext\|>", text, re.IGNORECASE):
        return
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.unk_token_id not in ids and tokenizer.bos_token_id not in ids
    assert all(0 <= index < len(tokenizer) for index in ids)
    alphabet = byte_of_letter()
    pieces = [piece.removesuffix("</w>") for piece in tokenizer.convert_ids_to_tokens(ids)]
    decoded = bytes(alphabet[letter] for piece in pieces for letter in piece).decode()
    assert without_spaces(decoded) == without_spaces(tokenizer.backend_tokenizer.normalizer.normalize_str(text))


def test_every_byte_has_a_token_inside_and_at_the_end_of_a_word(tokenizer):
    vocabulary = tokenizer.get_vocab()
    for letter in byte_of_letter():
        assert letter in vocabulary and f"{letter}</w>" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(tokenizer)))


def test_end_of_text_has_the_highest_id(tokenizer):
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == max(tokenizer.get_vocab().values())
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert len(ids) == MAX_LENGTH
    assert ids.index(max(ids)) == 4  # start, three words, end: CLIP pools at the first highest id


def test_a_long_prompt_is_cut_to_the_length_of_the_model(tokenizer):
    ids = tokenizer("a red circle " * 50, truncation=True).input_ids
    assert len(ids) == MAX_LENGTH and ids[-1] == tokenizer.eos_token_id


def test_the_pooled_embedding_is_that_of_the_end_of_text_whatever_the_padding(pipeline):
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    for text in ("", "a red circle", "a picture of a yellow triangle"):
        with torch.no_grad():
            padded, bare = (
                encoder(**tokenizer(text, padding=padding, return_tensors="pt")).text_embeds
                for padding in ("max_length", False)
            )
        torch.testing.assert_close(padded, bare, rtol=1e-5, atol=1e-6)


# ---- networks, autoencoders and schedulers


def test_the_transformer_has_the_sizes_by_which_comfyui_recognises_sd3():
    config = make_transformer().config
    assert config.in_channels == config.out_channels == 16
    assert config.attention_head_dim == 64
    assert config.num_layers == config.num_attention_heads
    assert config.caption_projection_dim == 64 * config.num_attention_heads
    assert config.qk_norm == "rms_norm"


def test_the_autoencoder_turns_a_picture_into_8x8x16_and_back():
    vae = make_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, RESOLUTION, RESOLUTION)).latent_dist.mode()
        assert latents.shape == (1, 16, 8, 8)
        assert vae.decode(latents).sample.shape == (1, 3, RESOLUTION, RESOLUTION)


def test_the_unet_is_conditioned_as_sdxls_is():
    config = make_unet().config
    assert config.addition_embed_type == "text_time" and config.in_channels == config.out_channels == 4
    assert config.cross_attention_dim == 64  # both text encoders side by side
    assert config.projection_class_embeddings_input_dim == 32 + 6 * config.addition_time_embed_dim
    assert config.down_block_types[0] == "DownBlock2D" and config.use_linear_projection


def test_the_sdxl_autoencoder_turns_a_picture_into_8x8x4_and_back_without_a_shift():
    vae = make_sdxl_vae()
    with torch.no_grad():
        latents = vae.encode(torch.zeros(1, 3, RESOLUTION, RESOLUTION)).latent_dist.mode()
        assert latents.shape == (1, 4, 8, 8)
        assert vae.decode(latents).sample.shape == (1, 3, RESOLUTION, RESOLUTION)
    assert vae.config.shift_factor is None and vae.config.latents_mean is None


def test_untrained_pipelines_draw_pictures(pipeline, sdxl_pipeline):
    for images in (draw_sd3(pipeline, output_type="pt"), draw_sdxl(sdxl_pipeline, output_type="pt")):
        assert images.shape == (2, 3, RESOLUTION, RESOLUTION)


def test_the_diffusion_scheduler_has_the_levels_of_sdxl_and_starts_at_full_noise():
    scheduler = make_diffusion_scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    alpha_bar = scheduler.alphas_cumprod[scheduler.timesteps]
    expected = torch.tensor([14.614647, 4.081731, 1.612887, 0.693205])  # of the published SDXL
    torch.testing.assert_close(((1 - alpha_bar) / alpha_bar).sqrt(), expected, rtol=1e-5, atol=0)
    assert scheduler.final_alpha_cumprod == 1  # the last step ends clean
    assert scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_scheduler_shifts_statically(shift):
    config = make_pipeline(max_length=MAX_LENGTH, shift=shift, seed=0).scheduler.config
    assert config.shift == shift and not config.use_dynamic_shifting


# ---- pipeline


def test_a_saved_pipeline_draws_the_same_latents(pipeline, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder_3"] == index["tokenizer_3"] == [None, None]
    # diffusers does not read this from the index
    reloaded = StableDiffusion3Pipeline.from_pretrained(tmp_path, text_encoder_3=None, tokenizer_3=None)
    reloaded.set_progress_bar_config(disable=True)
    assert reloaded.text_encoder_3 is None and reloaded.tokenizer_3 is None
    assert torch.equal(draw_sd3(reloaded), draw_sd3(pipeline))
    assert reloaded.tokenizer("a red circle").input_ids == pipeline.tokenizer("a red circle").input_ids


def test_a_saved_sdxl_pipeline_draws_the_same_latents_and_is_small(sdxl_pipeline, tmp_path):
    from diffusers import StableDiffusionXLPipeline

    sdxl_pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["force_zeros_for_empty_prompt"] is True
    reloaded = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    reloaded.set_progress_bar_config(disable=True)
    assert torch.equal(draw_sdxl(reloaded), draw_sdxl(sdxl_pipeline))
    in_half_precision = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) / 2
    assert in_half_precision < 12e6  # size in git


@pytest.mark.parametrize("kind", ["sd3", "sdxl"])
def test_a_teacher_in_half_precision_loads_in_float32_and_draws(kind, tmp_path):
    from diffusers import DiffusionPipeline

    make = {"sd3": partial(make_pipeline, shift=1.0), "sdxl": make_sdxl_pipeline}[kind]
    pipeline = make(max_length=MAX_LENGTH, seed=0)
    save_half(pipeline, tmp_path)
    stored = {value.dtype for path in tmp_path.rglob("*.safetensors") for value in load_file(path).values()}
    assert stored - {torch.int64} == {torch.float16}
    reloaded = DiffusionPipeline.from_pretrained(tmp_path, **({} if kind == "sdxl" else WITHOUT_T5))
    assert {part.dtype for part in reloaded.components.values() if hasattr(part, "dtype")} == {torch.float32}
    draw_sd3(reloaded) if kind == "sd3" else draw_sdxl(reloaded)
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            values = getattr(reloaded, name).state_dict()
            assert all(torch.equal(value.float(), values[key].float()) for key, value in part.state_dict().items())


@pytest.mark.parametrize("teacher", ["shapes_teacher", "shapes_sdxl_teacher"])
def test_the_pages_code_draws_with_the_embedded_teachers(teacher, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/embedded.md").read_text(), re.DOTALL)
    (code,) = [block for block in blocks if f"/{teacher}" in block]
    space = {}
    torch.manual_seed(0)
    exec(code, space)
    picture = to_tensor(space["image"])[None]
    assert read(picture).prompt.item() == captions().index("a red circle") and picture.shape[-1] == RESOLUTION


def test_the_seed_determines_the_weights_of_sdxl(sdxl_pipeline):
    before = torch.get_rng_state()
    same, other = (make_sdxl_pipeline(max_length=MAX_LENGTH, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    first, repeated, different = (pipeline.unet.conv_out.weight for pipeline in (sdxl_pipeline, same, other))
    assert torch.equal(first, repeated) and not torch.equal(first, different)


def test_the_seed_determines_the_weights_and_the_global_generator_stays_unchanged(pipeline):
    before = torch.get_rng_state()
    same, other = (make_pipeline(max_length=MAX_LENGTH, shift=1.0, seed=seed) for seed in (0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        first, repeated, different = (
            torch.cat([value.flatten() for value in getattr(p, name).state_dict().values()])
            for p in (pipeline, same, other)
        )
        assert torch.equal(first, repeated) and not torch.equal(first, different)
    assert not torch.equal(pipeline.text_encoder.text_projection.weight, pipeline.text_encoder_2.text_projection.weight)
