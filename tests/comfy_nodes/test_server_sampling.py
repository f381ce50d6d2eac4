"""Latents that the pack draws inside a real ComfyUI, compared with diffusers and with our own sampler."""

import pytest
import torch
from comfy_server import REPOSITORY, Graph
from safetensors.torch import load_file
from workflows import (
    HEADER,
    OFFICIAL,
    PUBLISHED,
    SD3_SHAPE,
    SDXL_HEADER,
    SDXL_SCALE,
    SDXL_SHAPE,
    SEED,
    SEEDS,
    TRAILING,
    TRAINED,
    assert_close,
    comfyui_version,
    conditioning,
    diffusers_sd3,
    diffusers_sdxl,
    draw,
    empty_latent,
    load_stock,
    load_student,
    our_latents,
    require_comfyui,
    sample,
    sample_with_parts,
    save_weights,
    scheduler,
    sd3_denoiser,
    sd3_units,
    stock,
    student,
    x0_sampling,
)

from dpdmd_pipeline.dpdmd.noise import add_noise, flow_schedule
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

require_comfyui()


# ---- SD3


def test_the_sampler_equals_the_pipeline_of_diffusers(server, sd3_file, tiny_sd3, sd3_prompt):
    latents = sd3_units(draw(server, stock(sd3_file), sd3_prompt, schedule=OFFICIAL))
    assert_close(latents, diffusers_sd3(tiny_sd3, sd3_prompt, noise_from_seeds(SEEDS, SD3_SHAPE)), 1e-5)


def test_a_students_own_schedule_wins_over_the_family_and_over_a_patched_shift(
    server, sd3_student, tiny_sd3, sd3_prompt
):
    def shifted(graph):
        return graph.add("ModelSamplingSD3", model=load_student(graph, sd3_student), shift=7.0)

    assert_close(sd3_units(draw(server, shifted, sd3_prompt)), our_latents(tiny_sd3, sd3_prompt, TRAINED), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_use_only_trained_levels(server, sd3_student, tiny_sd3, sd3_prompt, steps):
    latents = sd3_units(draw(server, student(sd3_student), sd3_prompt, steps=steps))
    levels = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 3: [1.0, 0.9, 0.6, 0.0]}[steps]
    assert_close(latents, our_latents(tiny_sd3, sd3_prompt, levels), 1e-5)


def test_connected_sigmas_replace_steps_and_denoise(server, sd3_student, tiny_sd3, sd3_prompt):
    graph = Graph()
    model = load_student(graph, sd3_student)
    sigmas = scheduler(graph, model, schedule="custom", custom="1, 0.7, 0.2, 0")
    prompt, latent = conditioning(server, graph, sd3_prompt), empty_latent(server, graph, SD3_SHAPE)
    latent = sample(graph, model, prompt, latent, steps=1, denoise=0.5, sigmas=sigmas)
    expected = our_latents(tiny_sd3, sd3_prompt, [1.0, 0.7, 0.2, 0.0])
    assert_close(sd3_units(server.latents(graph, latent)), expected, 1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_the_parts_in_a_custom_sampler_equal_the_sampler(server, sd3_student, tiny_sd3, sd3_prompt, split):
    graph = Graph()
    model, prompt = load_student(graph, sd3_student), conditioning(server, graph, sd3_prompt)
    sigmas = scheduler(graph, model)
    common = {
        "guider": graph.add("BasicGuider", model=model, conditioning=prompt),
        "sampler": graph.add("DPDMDSamplerSelect", method="deterministic"),
    }
    noise, latent = graph.add("DPDMDNoise", noise_seed=SEED), empty_latent(server, graph, SD3_SHAPE)
    if split:
        high = graph.add("SplitSigmas", sigmas=sigmas, step=1)
        latent = graph.add("SamplerCustomAdvanced", noise=noise, sigmas=high, latent_image=latent, **common)
        noise, sigmas = graph.add("DisableNoise"), [high[0], 1]
    latent = graph.add("SamplerCustomAdvanced", noise=noise, sigmas=sigmas, latent_image=latent, **common)
    assert_close(sd3_units(server.latents(graph, latent)), our_latents(tiny_sd3, sd3_prompt, TRAINED), 1e-5)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        (OFFICIAL, 4, PUBLISHED),
        (OFFICIAL, 2, [1.0, 0.008929, 0.0]),
        ("uniform (simple)", 4, [1.0, 0.9, 0.75, 0.5, 0.0]),
    ],
)
def test_the_scheduler_gives_the_published_levels(server, sd3_file, schedule, steps, expected):
    graph, path = Graph(), server.file(".safetensors")
    sigmas = scheduler(graph, load_stock(graph, sd3_file), steps=steps, schedule=schedule)
    graph.add("TestSaveSigmas", sigmas=sigmas, path=path)
    server.run(graph)
    torch.testing.assert_close(load_file(path)["sigmas"], torch.tensor(expected), rtol=0, atol=1e-6)


def test_without_per_image_seeds_the_pictures_are_those_of_ksampler(server, sd3_file, sd3_prompt):
    graph = Graph()
    model, prompt = load_stock(graph, sd3_file), conditioning(server, graph, sd3_prompt)
    latent = empty_latent(server, graph, SD3_SHAPE)
    widgets = {"seed": SEED, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    theirs = graph.add("KSampler", model=model, positive=prompt, negative=prompt, latent_image=latent, **widgets)
    mine = sample(graph, model, prompt, latent, per_image_seed=False, sigmas=scheduler(graph, model, schedule=OFFICIAL))
    path = server.file(".safetensors")
    graph.add("TestSaveLatent", latent=theirs, path=path)
    assert_close(server.latents(graph, mine), load_file(path)["samples"], 1e-6)


@pytest.mark.parametrize("denoise", [0.75, 0.5, 0.25])
def test_image_to_image_starts_on_a_trained_level(server, sd3_student, tiny_sd3, sd3_prompt, denoise):
    picture = noise_from_seeds([100, 101], SD3_SHAPE)
    latents = draw(server, student(sd3_student), sd3_prompt, latent={"samples": picture}, denoise=denoise)
    levels = flow_schedule(TRAINED[4 - round(4 * denoise) :])
    start = add_noise(sd3_units(picture), noise_from_seeds(SEEDS[:2], SD3_SHAPE), levels[0])
    with torch.no_grad():
        expected = rollout(sd3_denoiser(tiny_sd3, sd3_prompt), start, levels)
    assert_close(sd3_units(latents), expected, 1e-5)


def test_inpainting_changes_only_the_masked_region(server, sd3_student, sd3_prompt):
    picture, mask = noise_from_seeds([100], SD3_SHAPE), torch.zeros(1, 1, *SD3_SHAPE[1:])
    mask[..., 12:] = 1
    masked = {"samples": picture, "noise_mask": mask}
    change = (draw(server, student(sd3_student), sd3_prompt, latent=masked, denoise=0.75) - picture).abs()
    assert change[..., :12].max() < 1e-6 and change[..., 12:].min(dim=1).values.max() > 0.1


def test_an_empty_latent_of_another_family_gets_the_right_channels(server, sd3_student, tiny_sd3, sd3_prompt):
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=8 * SD3_SHAPE[2], height=8 * SD3_SHAPE[1], batch_size=1)
    latent = sample(graph, load_student(graph, sd3_student), conditioning(server, graph, sd3_prompt), latent)
    assert_close(sd3_units(server.latents(graph, latent)), our_latents(tiny_sd3, sd3_prompt, TRAINED, [SEED]), 1e-5)


# ---- seeds


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_a_picture_depends_only_on_its_seed_bit_for_bit(server, family, request):
    file, prompt = request.getfixturevalue(f"{family}_file"), request.getfixturevalue(f"{family}_prompt")
    shape, schedule = (SD3_SHAPE, OFFICIAL) if family == "sd3" else (SDXL_SHAPE, TRAILING)

    def draw_batch(seed, count, **latent):
        inputs = {"shape": shape, "count": count, "latent": latent, "schedule": schedule, "seed": seed}
        return draw(server, stock(file), prompt, **inputs)

    batch = draw_batch(SEED, 3)
    for index in range(3):
        assert torch.equal(batch[index], draw_batch(SEED + index, 1)[0])
    assert torch.equal(batch[1:], draw_batch(SEED, 2, batch_index=torch.tensor([1, 2])))
    assert not torch.equal(batch[0], batch[1])


def test_seeds_wrap_around_after_the_last(server, sd3_file, sd3_prompt):
    last, first = (
        draw(server, stock(sd3_file), sd3_prompt, count=count, seed=seed, steps=1, schedule=OFFICIAL)
        for seed, count in ((2**64 - 1, 2), (0, 1))
    )
    assert torch.equal(last[1], first[0])


@pytest.mark.skipif(comfyui_version().startswith("0.3."), reason="this version has no nested latents")
def test_per_image_noise_fills_nested_latents(server):
    graph, path = Graph(), server.file(".safetensors")
    graph.add("TestSaveNestedNoise", noise=graph.add("DPDMDNoise", noise_seed=SEED), path=path)
    server.run(graph)
    noise = load_file(path)
    assert torch.equal(noise["pictures"], noise_from_seeds(SEEDS[:2], (4, 8, 8)))
    assert noise["sound"].shape == (2, 8, 5) and noise["sound"].std() > 0.5


@pytest.mark.skipif(comfyui_version().startswith("0.3."), reason="this version keeps float32 between nodes")
def test_half_precision_between_nodes_rounds_the_result_alone(start_server, server, tiny_sd3, sd3_prompt):
    name = "diffusion_models/half.safetensors"
    inputs = {"latent": {"samples": torch.zeros(3, *SD3_SHAPE)}}
    expected = draw(server, student(save_weights(server, name, tiny_sd3.state_dict(), HEADER)), sd3_prompt, **inputs)
    with start_server(REPOSITORY / "comfy_nodes", "--fp16-intermediates", "--disable-mmap") as half:
        save_weights(half, name, tiny_sd3.state_dict(), HEADER)
        inputs["latent"]["samples"] = inputs["latent"]["samples"].half()
        latents = draw(half, student(name), sd3_prompt, **inputs)
    assert latents.dtype == torch.float16 and torch.equal(latents, expected.half())


# ---- SDXL


def test_the_deterministic_sdxl_student_equals_ddim_of_diffusers(server, sdxl_file, tiny_sdxl, sdxl_prompt):
    inputs = {"shape": SDXL_SHAPE, "method": "deterministic", "schedule": TRAILING}
    latents = draw(server, stock(sdxl_file), sdxl_prompt, **inputs) * SDXL_SCALE
    expected = diffusers_sdxl(tiny_sdxl, sdxl_prompt, noise_from_seeds(SEEDS, SDXL_SHAPE))
    assert_close(latents, expected, 1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("parts", [False, True])
def test_the_renoising_sdxl_student_equals_x0_sampling(server, tiny_sdxl, sdxl_prompt, parts):
    name = save_weights(server, "diffusion_models/sdxl_student.safetensors", tiny_sdxl.state_dict(), SDXL_HEADER)
    graph = Graph()
    model, prompt = load_student(graph, name), conditioning(server, graph, sdxl_prompt)
    index = torch.tensor([2, 0, 1])
    latent = empty_latent(server, graph, SDXL_SHAPE, batch_index=index)
    if parts:
        guider = graph.add("BasicGuider", model=model, conditioning=prompt)
        sigmas = scheduler(graph, model)
        latent = sample_with_parts(graph, latent, guider=guider, sigmas=sigmas, method="re-noise")
    else:
        latent = sample(graph, model, prompt, latent)
    expected = x0_sampling(tiny_sdxl, sdxl_prompt, [SEED + i for i in index.tolist()])
    assert_close(server.latents(graph, latent) * SDXL_SCALE, expected, 1e-5 * expected.abs().max().item())


def test_a_student_that_predicts_v_is_sampled_as_such(server, tiny_sdxl, sdxl_prompt):
    header = SDXL_HEADER | {"dpdmd.prediction": "v", "dpdmd.sampler": "euler"}
    name = save_weights(server, "diffusion_models/sdxl_v.safetensors", tiny_sdxl.state_dict(), header)
    latents = draw(server, student(name), sdxl_prompt, shape=SDXL_SHAPE) * SDXL_SCALE
    expected = diffusers_sdxl(tiny_sdxl, sdxl_prompt, noise_from_seeds(SEEDS, SDXL_SHAPE), "v_prediction")
    assert_close(latents, expected, 1e-5 * expected.abs().max().item())
