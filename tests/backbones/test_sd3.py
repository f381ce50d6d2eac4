"""Special to SD3: static shift, velocity, three text encoders."""

import shutil

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.backbones.sd3 import SD3, load
from dpdmd_pipeline.dpdmd.noise import flow_level

OPTIONS = {"resolution": 32, "max_sequence_length": 12, "level_range": (0.02, 0.98)}
PROMPTS = ["a red circle", "", "something that no caption says: naïve 日本 " * 5]


@pytest.fixture(scope="module")
def shifted_teacher(tiny_teacher, edited):
    """The tiny teacher with SD3's shift of 3."""
    return edited(tiny_teacher, "scheduler/scheduler_config.json", shift=3.0)


@pytest.fixture(scope="module")
def t5_teacher(tiny_teacher, tmp_path_factory):
    """The tiny teacher with a tiny T5 encoder as its third."""
    from diffusers import StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    tokenizer = T5TokenizerFast(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters], extra_ids=0)
    pipeline = load_pipeline(tiny_teacher)
    width = pipeline.transformer.config.joint_attention_dim
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=16, d_ff=width, num_layers=1, num_heads=4)
        encoder = T5EncoderModel(config).eval()
    folder = tmp_path_factory.mktemp("t5") / "teacher"
    components = pipeline.components | {"text_encoder_3": encoder, "tokenizer_3": tokenizer}
    StableDiffusion3Pipeline(**components).save_pretrained(folder)
    return folder


def load_pipeline(folder):
    from diffusers import StableDiffusion3Pipeline

    without = {} if (folder / "text_encoder_3").is_dir() else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count=2, seed=0):
    return torch.randn(count, 16, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- text


@pytest.mark.parametrize(("teacher", "length"), [("tiny_teacher", 12), ("t5_teacher", 20), ("t5_teacher", 7)])
def test_prompts_are_encoded_as_by_the_pipeline(teacher, length, request):
    folder = request.getfixturevalue(teacher)
    cond = SD3(folder, **OPTIONS | {"max_sequence_length": length}).encode(PROMPTS)
    with torch.no_grad():
        embeds, _, pooled, _ = load_pipeline(folder).encode_prompt(
            PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=length
        )
    assert cond["prompt_embeds"].shape == (len(PROMPTS), 12 + length, 64)  # CLIP's 12 tokens, then T5's
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["pooled_embeds"], pooled)
    third = cond["prompt_embeds"][:, 12:]
    assert bool((third != 0).any()) == (teacher == "t5_teacher")


def test_latents_with_t5_and_shift_3_are_those_of_the_pipeline(t5_teacher, edited):
    from dpdmd_pipeline.backbones.base import guided
    from dpdmd_pipeline.dpdmd.sampling import rollout

    folder = edited(t5_teacher, "scheduler/scheduler_config.json", shift=3.0)
    backbone = SD3(folder, **OPTIONS | {"max_sequence_length": 20})
    cond, uncond = backbone.encode(PROMPTS[:2]), backbone.encode([""])
    with torch.no_grad():
        denoise = guided(backbone, backbone.load_model(), cond, uncond, 3.5)
        ours = rollout(denoise, noise(), backbone.schedule(4))
    pipeline = load_pipeline(folder)
    expected = pipeline(
        PROMPTS[:2],
        num_inference_steps=4,
        guidance_scale=3.5,
        latents=noise(),
        height=32,
        width=32,
        max_sequence_length=20,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_encoding_reads_neither_the_transformers_weights_nor_the_autoencoders(tiny_teacher, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_teacher, folder)
    for component in ("transformer", "vae"):
        for weights in (folder / component).glob("*.safetensors"):
            weights.unlink()
    complete, textual = (SD3(path, **OPTIONS).encode(PROMPTS) for path in (tiny_teacher, folder))
    assert all(torch.equal(complete[name], textual[name]) for name in complete)


# ---- levels


def test_the_shift_is_that_of_the_teachers_scheduler(tiny_teacher, shifted_teacher):
    for folder, shift, second in ((tiny_teacher, 1.0, 0.667), (shifted_teacher, 3.0, 0.8577)):
        backbone, scheduler = SD3(folder, **OPTIONS), load_pipeline(folder).scheduler
        scheduler.set_timesteps(4)
        assert backbone.shift == shift
        torch.testing.assert_close(backbone.schedule(4).sigma, scheduler.sigmas, rtol=0, atol=1e-7)
        assert backbone.schedule(4).sigma[1].item() == pytest.approx(second, abs=5e-4)


def test_a_student_may_have_a_grid_of_its_own(shifted_teacher):
    backbone = SD3(shifted_teacher, **OPTIONS)
    assert torch.equal(backbone.student_schedule("diffusers", 4).sigma, backbone.schedule(4).sigma)
    even = torch.tensor([1, 0.9, 0.75, 0.5, 0])
    torch.testing.assert_close(backbone.student_schedule("shifted", 4).sigma, even)
    torch.testing.assert_close(backbone.student_schedule([1.0, 0.9, 0.75, 0.5], 4).sigma, even)
    with refuses(ValueError, "0.9", "fall strictly"):
        backbone.student_schedule([1.0, 0.75, 0.9, 0.5], 4)


def test_random_levels_fill_the_shifted_range(shifted_teacher):
    uniform = torch.linspace(0, 1, 101)
    sigma = SD3(shifted_teacher, **OPTIONS).random_level(uniform).sigma.flatten()
    raw = 0.02 + 0.96 * uniform
    torch.testing.assert_close(sigma, 3 * raw / (1 + 2 * raw))


# ---- network


def test_denoise_is_latents_minus_sigma_times_the_networks_velocity(tiny_teacher):
    backbone = SD3(tiny_teacher, **OPTIONS)
    model, cond = backbone.load_model(), backbone.encode(PROMPTS[:2])
    sigma = torch.tensor([0.8, 0.3])
    with torch.no_grad():
        velocity = model(
            hidden_states=noise(),
            timestep=1000 * sigma,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_embeds"],
            return_dict=False,
        )[0]
        x0 = backbone.denoise(model, noise(), flow_level(sigma.view(-1, 1, 1, 1)), cond)
    torch.testing.assert_close(x0, noise() - sigma.view(-1, 1, 1, 1) * velocity)


def test_guiding_x0_is_guiding_the_velocity(tiny_teacher):
    backbone, latents, sigma = SD3(tiny_teacher, **OPTIONS), noise(), 0.7
    cond, uncond = noise(seed=1), noise(seed=2)
    velocity = uncond + 3.5 * (cond - uncond)
    ours = backbone.guide(
        latents - sigma * cond, latents - sigma * uncond, 3.5, latents, flow_level(torch.tensor(sigma))
    )
    torch.testing.assert_close(ours, latents - sigma * velocity, rtol=1e-5, atol=1e-5)


def test_a_network_in_half_precision_still_gives_x0_in_float32(tiny_teacher):
    full, half = (SD3(tiny_teacher, **OPTIONS, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    cond, level = full.encode(PROMPTS[:2]), flow_level(torch.tensor(0.5))
    model = half.load_model()
    assert next(model.parameters()).dtype == torch.bfloat16
    assert half.encode(PROMPTS[:2])["prompt_embeds"].dtype == torch.bfloat16
    with torch.no_grad():
        ours, exact = half.denoise(model, noise(), level, cond), full.denoise(full.load_model(), noise(), level, cond)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() / (exact - noise()).norm() < 0.05


# ---- refusals


def test_a_scheduler_that_shifts_dynamically_is_refused(tiny_teacher, edited):
    folder = edited(tiny_teacher, "scheduler/scheduler_config.json", use_dynamic_shifting=True)
    with refuses(ValueError, "use_dynamic_shifting"):
        SD3(folder, **OPTIONS)


@pytest.mark.parametrize("resolution", [4, 30, 36])
def test_a_resolution_that_does_not_divide_into_patches_is_refused(tiny_teacher, resolution):
    with pytest.raises(ValueError, match=rf"backbone.resolution {resolution} x .* 8\b.* (8|32|40) x"):
        SD3(tiny_teacher, **OPTIONS | {"resolution": resolution})


def test_latents_have_the_shape_of_the_configured_resolution(tiny_teacher):
    assert load(tiny_teacher, **OPTIONS).latent_shape == (16, 8, 8)
    assert load(tiny_teacher, **OPTIONS | {"resolution": 16}).latent_shape == (16, 4, 4)
