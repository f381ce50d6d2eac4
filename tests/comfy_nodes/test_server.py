"""The pack inside a real ComfyUI, held against diffusers and against our own sampler.

Set COMFYUI_PATH to a checkout, and COMFY_PYTHON to its interpreter if it has its own. `-rP` prints how equal.
"""

import asyncio
import copy
import json
import os
import re
import struct
from pathlib import Path

import pytest
import torch
from comfy_server import REPOSITORY, Graph, RefusedError
from safetensors.torch import load_file, save_file

from dpdmd_pipeline.dpdmd.noise import add_noise, flow_schedule, vp_schedule, x0_from_eps, x0_from_velocity
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

if not os.environ.get("COMFYUI_PATH"):
    pytest.skip("COMFYUI_PATH is not set: no ComfyUI to test in", allow_module_level=True)

_VERSION_FILE = Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py"
VERSION = re.search(r'"(.+)"', _VERSION_FILE.read_text())[1] if _VERSION_FILE.is_file() else "not found"

SD3_SHAPE, SDXL_SHAPE = (16, 16, 24), (4, 16, 24)
SEED = 7
OFFICIAL = [1.0, 0.857692, 0.602151, 0.008929, 0.0]
TRAINED = [1.0, 0.9, 0.6, 0.3, 0.0]
HEADER = {
    "format": "pt",
    "dpdmd.format": "1",
    "dpdmd.kind": "full",
    "dpdmd.family": "sd3",
    "dpdmd.prediction": "flow",
    "dpdmd.sampler": "euler",
    "dpdmd.sigmas": json.dumps(TRAINED),
    "dpdmd.shift": "3.0",
    "dpdmd.guidance": "1.0",
}
SDXL_HEADER = {
    "dpdmd.format": "1",
    "dpdmd.family": "sdxl",
    "dpdmd.prediction": "eps",
    "dpdmd.sampler": "renoise",
    "dpdmd.timesteps": "[999, 749, 499, 249]",
    "dpdmd.guidance": "1.0",
}


# ---- files and workflows


def place(server, name, state, metadata=None):
    """Put weights into the server's models folder, and say what Load DP-DMD Student calls them."""
    save_file({key: value.detach().clone().contiguous() for key, value in state.items()}, at(server, name), metadata)
    return name


def at(server, name):
    return server.base / "models" / name


def loaded(graph, name, **inputs):
    return graph.add("DPDMDLoader", student_name=name, **{"weight_dtype": "default", "strength": 1.0} | inputs)


def stock(graph, name):
    return graph.add("UNETLoader", unet_name=name.removeprefix("diffusion_models/"), weight_dtype="default")


def empty(server, graph, shape, count=3, **extra):
    return graph.add("TestLatent", path=server.given(samples=torch.zeros(count, *shape), **extra))


def prompted(server, graph, prompt):
    return graph.add("TestConditioning", path=server.given(**prompt))


def sampled(graph, model, prompt, latent, **inputs):
    widgets = {"seed": SEED, "steps": 4, "denoise": 1.0, "method": "auto", "per_image_seed": True}
    return graph.add("DPDMDSampler", model=model, positive=prompt, latent_image=latent, **widgets | inputs)


def sd3_latents(latent):
    """From ComfyUI's LATENT to what the network sees."""
    return (latent - 0.0609) * 1.5305


@pytest.fixture(scope="module")
def sd3_file(server, tiny_sd3):
    """The tiny SD3 without a header, as a stock file."""
    return place(server, "diffusion_models/sd3.safetensors", tiny_sd3.state_dict())


@pytest.fixture(scope="module")
def sd3_student(server, tiny_sd3):
    """The tiny SD3 as a student with a schedule of its own."""
    return place(server, "diffusion_models/sd3_student.safetensors", tiny_sd3.state_dict(), HEADER)


@pytest.fixture(scope="module")
def sdxl_file(server, tiny_sdxl):
    """The tiny SDXL without a header."""
    return place(server, "diffusion_models/sdxl.safetensors", tiny_sdxl.state_dict())


# ---- oracles


def diffusers_sd3(transformer, prompt, noise, **inputs):
    """Latents of StableDiffusion3Pipeline with the published scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    nothing = dict.fromkeys(
        ["vae", *(f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))]
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **nothing
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        num_inference_steps=4, guidance_scale=1.0, **for_pipeline(prompt, noise), **size_of(noise), **inputs
    ).images


def diffusers_sdxl(unet, prompt, noise, prediction="epsilon"):
    """Latents of StableDiffusionXLPipeline with DDIM, eta 0, trailing timesteps."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        timestep_spacing="trailing",
        prediction_type=prediction,
    )
    nothing = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, add_watermarker=False, **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(num_inference_steps=4, guidance_scale=1.0, **for_pipeline(prompt, noise), **size_of(noise)).images


def for_pipeline(prompt, noise):
    return {
        "prompt_embeds": prompt["prompt_embeds"].expand(len(noise), -1, -1),
        "pooled_prompt_embeds": prompt["pooled_embeds"].expand(len(noise), -1),
        "latents": noise,
        "output_type": "latent",
    }


def size_of(noise):
    return {"height": 8 * noise.shape[-2], "width": 8 * noise.shape[-1]}


def sd3_denoiser(transformer, prompt):
    """Our own sampler's view of an SD3."""

    def denoise(latents, level):
        velocity = transformer(
            hidden_states=latents,
            timestep=level.timestep.expand(len(latents)),
            encoder_hidden_states=prompt["prompt_embeds"].expand(len(latents), -1, -1),
            pooled_projections=prompt["pooled_embeds"].expand(len(latents), -1),
        ).sample
        return x0_from_velocity(latents, velocity, level)

    return denoise


@torch.no_grad()
def ours(transformer, prompt, sigmas, seeds=(SEED, SEED + 1, SEED + 2), shape=SD3_SHAPE):
    """Latents of dpdmd_pipeline's sampler."""
    return rollout(sd3_denoiser(transformer, prompt), noise_from_seeds(seeds, shape), flow_schedule(sigmas))


def close(found, expected, tolerance):
    difference = (found - expected).abs().max().item()
    print(f"ComfyUI {VERSION}: largest difference {difference:.1e} of latents up to {expected.abs().max():.3g}")
    assert difference <= tolerance, f"largest difference {difference:.2e}, allowed {tolerance:.0e}"


# ---- the pack


@pytest.mark.parametrize("version", [VERSION])
def test_the_nodes_are_there_with_words_on_everything(server, version):
    assert server.get("system_stats")["system"]["comfyui_version"] == version
    nodes = {name: node for name, node in server.get("object_info").items() if node["category"] == "DP-DMD"}
    assert sorted(nodes) == [
        "DPDMDFirstStepGuider",
        "DPDMDLoader",
        "DPDMDNoise",
        "DPDMDSampler",
        "DPDMDSamplerSelect",
        "DPDMDScheduler",
    ]
    for node in nodes.values():
        assert node["python_module"] == "custom_nodes.dpdmd" and node["description"]
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert all(options["tooltip"] for _kind, options in inputs.values()) and all(node["output_tooltips"])


def test_the_pack_is_imported_in_a_fifth_of_a_second_and_brings_nothing_of_the_pipeline(server):
    graph, path = Graph(), server.file(".json")
    graph.add("TestPack", path=path)
    server.run(graph)
    found = json.loads(Path(path).read_text())
    assert found["seconds"] <= 0.2, "CPU seconds, so that a busy machine does not matter"
    assert set(found["foreign"]) <= {"accelerate"}  # which transformers loads by itself where it is installed


def test_a_clone_of_the_whole_repository_is_a_pack_too(start_server):
    with start_server(REPOSITORY) as server:
        nodes = [node for node in server.get("object_info").values() if node["category"] == "DP-DMD"]
        assert len(nodes) == 6 and all(node["python_module"] == "custom_nodes.dpdmd" for node in nodes)


# ---- SD3


def test_the_sampler_equals_the_pipeline_of_diffusers(server, sd3_file, tiny_sd3, sd3_prompt):
    graph = Graph()
    latent = sampled(
        graph, stock(graph, sd3_file), prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE)
    )
    found = sd3_latents(server.latents(graph, latent))
    expected = diffusers_sd3(tiny_sd3, sd3_prompt, noise_from_seeds([SEED, SEED + 1, SEED + 2], SD3_SHAPE))
    close(found, expected, 1e-5)
    assert "no DP-DMD header" in server.log.read_text()  # the node says that the schedule is the published one


def test_a_students_own_schedule_wins_over_the_family_and_over_a_patched_shift(
    server, sd3_student, tiny_sd3, sd3_prompt
):
    graph = Graph()
    model = graph.add("ModelSamplingSD3", model=loaded(graph, sd3_student), shift=7.0)
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE))
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, TRAINED), 1e-5)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_fewer_steps_use_trained_levels_alone(server, sd3_student, tiny_sd3, sd3_prompt, steps):
    graph = Graph()
    prompt, latent = prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE)
    latent = sampled(graph, loaded(graph, sd3_student), prompt, latent, steps=steps)
    levels = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 3: [1.0, 0.9, 0.6, 0.0]}[steps]
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, levels), 1e-5)


def test_connected_sigmas_replace_steps_and_denoise(server, sd3_student, tiny_sd3, sd3_prompt):
    graph = Graph()
    model = loaded(graph, sd3_student)
    sigmas = graph.add("DPDMDScheduler", model=model, steps=4, denoise=1.0, schedule="custom", custom="1, 0.7, 0.2, 0")
    prompt, latent = prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE)
    latent = sampled(graph, model, prompt, latent, steps=1, denoise=0.5, sigmas=sigmas)
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, [1.0, 0.7, 0.2, 0.0]), 1e-5)


@pytest.mark.parametrize("split", [False, True])
def test_the_parts_in_a_custom_sampler_equal_the_sampler(server, sd3_student, tiny_sd3, sd3_prompt, split):
    graph = Graph()
    model, prompt = loaded(graph, sd3_student), prompted(server, graph, sd3_prompt)
    sigmas = graph.add("DPDMDScheduler", model=model, steps=4, denoise=1.0, schedule="auto", custom="")
    common = {
        "guider": graph.add("BasicGuider", model=model, conditioning=prompt),
        "sampler": graph.add("DPDMDSamplerSelect", method="deterministic"),
    }
    noise, latent = graph.add("DPDMDNoise", noise_seed=SEED), empty(server, graph, SD3_SHAPE)
    if split:
        high = graph.add("SplitSigmas", sigmas=sigmas, step=1)
        latent = graph.add("SamplerCustomAdvanced", noise=noise, sigmas=high, latent_image=latent, **common)
        noise, sigmas = graph.add("DisableNoise"), [high[0], 1]
    latent = graph.add("SamplerCustomAdvanced", noise=noise, sigmas=sigmas, latent_image=latent, **common)
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, TRAINED), 1e-5)


@pytest.mark.parametrize(
    ("schedule", "steps", "expected"),
    [
        ("auto", 4, OFFICIAL),
        ("SD3.5 official (diffusers flow)", 2, [1.0, 0.008929, 0.0]),
        ("uniform (simple)", 4, [1.0, 0.9, 0.75, 0.5, 0.0]),
    ],
)
def test_the_scheduler_gives_the_published_levels(server, sd3_file, schedule, steps, expected):
    graph, path = Graph(), server.file(".safetensors")
    sigmas = graph.add(
        "DPDMDScheduler", model=stock(graph, sd3_file), steps=steps, denoise=1.0, schedule=schedule, custom=""
    )
    graph.add("TestSaveSigmas", sigmas=sigmas, path=path)
    server.run(graph)
    torch.testing.assert_close(load_file(path)["sigmas"], torch.tensor(expected), rtol=0, atol=1e-6)


def test_without_per_image_seeds_the_pictures_are_those_of_ksampler(server, sd3_file, sd3_prompt):
    graph = Graph()
    model, prompt = stock(graph, sd3_file), prompted(server, graph, sd3_prompt)
    latent = empty(server, graph, SD3_SHAPE)
    widgets = {"seed": SEED, "steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    theirs = graph.add("KSampler", model=model, positive=prompt, negative=prompt, latent_image=latent, **widgets)
    mine = sampled(graph, model, prompt, latent, per_image_seed=False)
    path = server.file(".safetensors")
    graph.add("TestSaveLatent", latent=theirs, path=path)
    close(server.latents(graph, mine), load_file(path)["samples"], 1e-6)


@pytest.mark.parametrize("denoise", [0.75, 0.5, 0.25])
def test_image_to_image_starts_on_a_trained_level(server, sd3_student, tiny_sd3, sd3_prompt, denoise):
    picture = noise_from_seeds([100, 101], SD3_SHAPE)
    graph = Graph()
    latent = graph.add("TestLatent", path=server.given(samples=picture))
    latent = sampled(graph, loaded(graph, sd3_student), prompted(server, graph, sd3_prompt), latent, denoise=denoise)
    levels = flow_schedule(TRAINED[4 - round(4 * denoise) :])
    start = add_noise(sd3_latents(picture), noise_from_seeds([SEED, SEED + 1], SD3_SHAPE), levels[0])
    with torch.no_grad():
        expected = rollout(sd3_denoiser(tiny_sd3, sd3_prompt), start, levels)
    close(sd3_latents(server.latents(graph, latent)), expected, 1e-5)


def test_inpainting_changes_only_what_the_mask_opens(server, sd3_student, sd3_prompt):
    picture, mask = noise_from_seeds([100], SD3_SHAPE), torch.zeros(1, 1, *SD3_SHAPE[1:])
    mask[..., 12:] = 1
    graph = Graph()
    latent = graph.add("TestLatent", path=server.given(samples=picture, noise_mask=mask))
    latent = sampled(graph, loaded(graph, sd3_student), prompted(server, graph, sd3_prompt), latent, denoise=0.75)
    change = (server.latents(graph, latent) - picture).abs()
    assert change[..., :12].max() < 1e-6 and change[..., 12:].min(dim=1).values.max() > 0.1


def test_an_empty_latent_of_another_family_is_given_the_right_channels(server, sd3_student, tiny_sd3, sd3_prompt):
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=8 * SD3_SHAPE[2], height=8 * SD3_SHAPE[1], batch_size=1)
    latent = sampled(graph, loaded(graph, sd3_student), prompted(server, graph, sd3_prompt), latent)
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, TRAINED, [SEED]), 1e-5)


# ---- seeds


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_a_picture_depends_on_its_seed_alone_bit_for_bit(server, family, request):
    file, prompt = request.getfixturevalue(f"{family}_file"), request.getfixturevalue(f"{family}_prompt")
    shape = SD3_SHAPE if family == "sd3" else SDXL_SHAPE

    def drawn(seed, count, **extra):
        graph = Graph()
        latent = empty(server, graph, shape, count, **extra)
        model, positive = stock(graph, file), prompted(server, graph, prompt)
        return server.latents(graph, sampled(graph, model, positive, latent, seed=seed))

    batch = drawn(SEED, 3)
    for index in range(3):
        assert torch.equal(batch[index], drawn(SEED + index, 1)[0])
    assert torch.equal(batch[1:], drawn(SEED, 2, batch_index=torch.tensor([1, 2])))
    assert not torch.equal(batch[0], batch[1])


def test_seeds_wrap_around_after_the_last(server, sd3_file, sd3_prompt):
    def drawn(seed, count):
        graph = Graph()
        model, prompt = stock(graph, sd3_file), prompted(server, graph, sd3_prompt)
        latent = empty(server, graph, SD3_SHAPE, count)
        return server.latents(graph, sampled(graph, model, prompt, latent, seed=seed, steps=1))

    assert torch.equal(drawn(2**64 - 1, 2)[1], drawn(0, 1)[0])


# ---- SDXL


def test_the_deterministic_sdxl_student_equals_ddim_of_diffusers(server, sdxl_file, tiny_sdxl, sdxl_prompt):
    graph = Graph()
    model, prompt = stock(graph, sdxl_file), prompted(server, graph, sdxl_prompt)
    latent = sampled(graph, model, prompt, empty(server, graph, SDXL_SHAPE), method="deterministic")
    found = server.latents(graph, latent) * 0.13025
    expected = diffusers_sdxl(tiny_sdxl, sdxl_prompt, noise_from_seeds([SEED, SEED + 1, SEED + 2], SDXL_SHAPE))
    close(found, expected, 1e-5 * expected.abs().max().item())


@torch.no_grad()
def renoised(unet, prompt, seeds):
    """x0 sampling by hand: each picture's generator gives its start, then its fresh noise."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    height, width = (8.0 * size for size in SDXL_SHAPE[1:])
    added = {
        "text_embeds": prompt["pooled_embeds"].expand(len(seeds), -1),
        "time_ids": torch.tensor([[height, width, 0, 0, height, width]]).expand(len(seeds), -1),
    }
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    levels = vp_schedule(4, (1 - betas).cumprod(0))
    x0 = torch.zeros(len(seeds), *SDXL_SHAPE)
    for level in levels[:-1]:
        fresh = torch.stack([torch.randn(SDXL_SHAPE, generator=generator) for generator in generators])
        latents = fresh if level.timestep == 999 else add_noise(x0, fresh, level)
        context = prompt["prompt_embeds"].expand(len(seeds), -1, -1)
        eps = unet(latents, level.timestep, context, added_cond_kwargs=added).sample
        x0 = x0_from_eps(latents, eps, level)
    return x0


@pytest.mark.parametrize("parts", [False, True])
def test_the_renoising_sdxl_student_equals_x0_sampling(server, tiny_sdxl, sdxl_prompt, parts):
    name = place(server, "diffusion_models/sdxl_student.safetensors", tiny_sdxl.state_dict(), SDXL_HEADER)
    graph = Graph()
    model, prompt = loaded(graph, name), prompted(server, graph, sdxl_prompt)
    index = torch.tensor([2, 0, 1])
    latent = empty(server, graph, SDXL_SHAPE, batch_index=index)
    if parts:
        latent = graph.add(
            "SamplerCustomAdvanced",
            noise=graph.add("DPDMDNoise", noise_seed=SEED),
            guider=graph.add("BasicGuider", model=model, conditioning=prompt),
            sampler=graph.add("DPDMDSamplerSelect", method="re-noise"),
            sigmas=graph.add("DPDMDScheduler", model=model, steps=4, denoise=1.0, schedule="auto", custom=""),
            latent_image=latent,
        )
    else:
        latent = sampled(graph, model, prompt, latent)
    expected = renoised(tiny_sdxl, sdxl_prompt, [SEED + i for i in index.tolist()])
    found = server.latents(graph, latent) * 0.13025
    close(found, expected, 1e-5 * expected.abs().max().item())


def test_a_student_that_predicts_v_is_sampled_as_such(server, tiny_sdxl, sdxl_prompt):
    header = SDXL_HEADER | {"dpdmd.prediction": "v", "dpdmd.sampler": "euler"}
    name = place(server, "diffusion_models/sdxl_v.safetensors", tiny_sdxl.state_dict(), header)
    graph = Graph()
    prompt, latent = prompted(server, graph, sdxl_prompt), empty(server, graph, SDXL_SHAPE)
    found = server.latents(graph, sampled(graph, loaded(graph, name), prompt, latent)) * 0.13025
    noise = noise_from_seeds([SEED, SEED + 1, SEED + 2], SDXL_SHAPE)
    expected = diffusers_sdxl(tiny_sdxl, sdxl_prompt, noise, "v_prediction")
    close(found, expected, 1e-5 * expected.abs().max().item())


# ---- files


@pytest.fixture(scope="module")
def embedded_student(server, tmp_path_factory):
    """A network of the embedded world, saved as `train` saves its student; with prompts and its backbone."""
    from dpdmd_pipeline.backbones.base import load_backbone
    from dpdmd_pipeline.backbones.student_file import StudentHeader, save_student

    teacher = REPOSITORY / "data" / "06_models" / "shapes_teacher"
    backbone = load_backbone("sd3", teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))
    folder = tmp_path_factory.mktemp("student")
    levels = backbone.student_schedule([1.0, 0.75, 0.5, 0.25], 4)
    header = StudentHeader(family="sd3", sigmas=levels.sigma.tolist())
    save_student(folder, backbone.load_model(), header)
    target = at(server, "diffusion_models/embedded.safetensors")
    target.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    return backbone, levels


@pytest.mark.parametrize("loader", ["Load DP-DMD Student", "Load Diffusion Model"])
def test_a_student_of_the_embedded_world_gives_our_samplers_latents(server, embedded_student, loader):
    from dpdmd_pipeline.backbones.base import conditioned

    backbone, levels = embedded_student
    cond = backbone.encode(["a red circle"])
    graph = Graph()
    name = "diffusion_models/embedded.safetensors"
    model = loaded(graph, name) if loader == "Load DP-DMD Student" else stock(graph, name)
    inputs = {}
    if loader == "Load Diffusion Model":  # it drops the header
        inputs["sigmas"] = graph.add(
            "DPDMDScheduler", model=model, steps=4, denoise=1.0, schedule="custom", custom="1 0.75 0.5 0.25 0"
        )
    latent = empty(server, graph, backbone.latent_shape)
    latent = sampled(graph, model, prompted(server, graph, cond), latent, **inputs)
    with torch.no_grad():
        noise = noise_from_seeds([SEED, SEED + 1, SEED + 2], backbone.latent_shape)
        repeated = {key: value.expand(3, *value.shape[1:]) for key, value in cond.items()}
        expected = rollout(conditioned(backbone, backbone.load_model(), repeated), noise, levels)
    close(sd3_latents(server.latents(graph, latent)), expected, 1e-4)


def test_a_released_state_dict_with_wrapped_keys_loads(server, tiny_sd3, sd3_prompt):
    state = {f"module.transformer.{key}": value for key, value in tiny_sd3.state_dict().items()}
    torch.save({"state_dict": state}, at(server, "diffusion_models/released.pt"))
    graph, path = Graph(), server.file(".txt")
    model = loaded(graph, "diffusion_models/released.pt")
    graph.add("TestSaveText", text=[model[0], 1], path=path)
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE))
    close(sd3_latents(server.latents(graph, latent)), ours(tiny_sd3, sd3_prompt, OFFICIAL), 1e-5)
    count = len(state)
    assert f"full sd3 student, {count} of {count} keys\nno DP-DMD header" in Path(path).read_text()


def test_a_student_in_comfyuis_own_spelling_loads(server, sd3_file):
    path, text = at(server, "diffusion_models/own_spelling.safetensors"), server.file(".txt")
    graph = Graph()
    graph.add("TestSaveNetwork", model=stock(graph, sd3_file), path=str(path))
    server.run(graph)
    state = load_file(path)
    name = place(server, "diffusion_models/own_spelling.safetensors", state, HEADER)
    graph = Graph()
    graph.add("TestSaveText", text=[loaded(graph, name)[0], 1], path=text)
    server.run(graph)
    assert f"{len(state)} of {len(state)} keys\nflow, euler, 4 steps" in Path(text).read_text()


def test_a_file_that_was_replaced_is_loaded_again(server, tiny_sd3, sd3_prompt):
    def drawn(state):
        name = place(server, "diffusion_models/replaced.safetensors", state, HEADER)
        graph = Graph()
        latent = empty(server, graph, SD3_SHAPE, 1)
        return server.latents(graph, sampled(graph, loaded(graph, name), prompted(server, graph, sd3_prompt), latent))

    other = tiny_sd3.state_dict() | {"proj_out.bias": torch.ones_like(tiny_sd3.proj_out.bias)}
    assert not torch.equal(drawn(tiny_sd3.state_dict()), drawn(other))


def test_fp8_weights_are_close(server, sd3_student, tiny_sd3, sd3_prompt):
    graph = Graph()
    model = loaded(graph, sd3_student, weight_dtype="fp8_e4m3fn")
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE))
    change = sd3_latents(server.latents(graph, latent)) - ours(tiny_sd3, sd3_prompt, TRAINED)
    assert 0 < change.abs().max() < 0.5


SD3_MODULES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.norm1.linear",
]
SDXL_MODULES = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in",
    "up_blocks.1.resnets.0.conv1",
]


def adapter(network, modules, rank=4, seed=0):
    """Random LoRA factors in PEFT's spelling."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        weight = network.get_submodule(module).weight
        state[f"{module}.lora_A.weight"] = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
        tail = (1,) * (weight.ndim - 2)
        state[f"{module}.lora_B.weight"] = 0.2 * torch.randn(len(weight), rank, *tail, generator=generator)
    return state


def merged(network, state, scale):
    """The network with the LoRA in its weights."""
    network = copy.deepcopy(network)
    for key in state:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up, down = (state[f"{module}.lora_{factor}.weight"].flatten(1) for factor in "BA")
            weight = network.get_submodule(module).weight
            weight.data += scale * (up @ down).view_as(weight)
    return network


def renamed(state, spelling):
    """A LoRA as its many writers spell it."""
    if spelling == "kohya":
        words = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
        return {"lora_unet_" + key[:-14].replace(".", "_") + words[key[-14:]]: value for key, value in state.items()}
    if spelling == "peft with adapter name":
        return {f"base_model.model.{key[:-7]}.default.weight": value for key, value in state.items()}
    return {f"{spelling}{key}": value for key, value in state.items()}


@pytest.mark.parametrize("spelling", ["transformer.", "base_model.model.", "peft with adapter name", ""])
def test_an_sd3_lora_equals_merged_weights_however_its_keys_are_spelled(
    server, sd3_file, tiny_sd3, sd3_prompt, spelling
):
    state = adapter(tiny_sd3, SD3_MODULES)
    header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "8.0"}
    name = place(server, "loras/sd3_lora.safetensors", renamed(state, spelling), header)
    graph, path = Graph(), server.file(".txt")
    model = loaded(graph, name, base_model=stock(graph, sd3_file), strength=0.5)
    graph.add("TestSaveText", text=[model[0], 1], path=path)
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE))
    expected = ours(merged(tiny_sd3, state, 0.5 * 8 / 4), sd3_prompt, TRAINED)
    close(sd3_latents(server.latents(graph, latent)), expected, 1e-5)
    assert "6 of 6 modules\nflow, euler, 4 steps\nlevels 1, 0.9, 0.6, 0.3, 0" in Path(path).read_text()


@pytest.mark.parametrize("spelling", ["kohya", "unet.", "base_model.model.", ""])
def test_an_sdxl_lora_equals_merged_weights_however_its_keys_are_spelled(
    server, sdxl_file, tiny_sdxl, sdxl_prompt, spelling
):
    state = adapter(tiny_sdxl, SDXL_MODULES)
    alphas = {}
    if spelling == "kohya":
        alphas = {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(8.0) for module in SDXL_MODULES}
    header = SDXL_HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "8"}
    name = place(server, "loras/sdxl_lora.safetensors", renamed(state, spelling) | alphas, header)
    graph = Graph()
    model = loaded(graph, name, base_model=stock(graph, sdxl_file))
    latent = sampled(graph, model, prompted(server, graph, sdxl_prompt), empty(server, graph, SDXL_SHAPE))
    expected = renoised(merged(tiny_sdxl, state, 2.0), sdxl_prompt, [SEED, SEED + 1, SEED + 2])
    found = server.latents(graph, latent) * 0.13025
    close(found, expected, 1e-5 * expected.abs().max().item())


# ---- the teacher's first step


@pytest.mark.parametrize("student", ["full", "lora"])
def test_the_first_step_is_the_guided_teachers_and_the_rest_the_students(
    server, sd3_file, tiny_sd3, sd3_prompt, student
):
    state = adapter(tiny_sd3, SD3_MODULES)
    network = merged(tiny_sd3, state, 1.0)
    header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
    lora = place(server, "loras/first_step.safetensors", renamed(state, "transformer."), header)
    full = place(server, "diffusion_models/first_step.safetensors", network.state_dict(), HEADER)
    graph, calls = Graph(), server.file(".calls")
    teacher = stock(graph, sd3_file)
    model = loaded(graph, full) if student == "full" else loaded(graph, lora, base_model=teacher)
    counted = graph.add("TestCountCalls", model=model, seconds=0.0, path=calls)
    negative = {key: value.flip(-1) for key, value in sd3_prompt.items()}
    guider = graph.add(
        "DPDMDFirstStepGuider",
        student=counted,
        teacher=teacher,
        positive=prompted(server, graph, sd3_prompt),
        negative=prompted(server, graph, negative),
        teacher_steps=1,
        teacher_cfg=3.5,
    )
    latent = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DPDMDNoise", noise_seed=SEED),
        guider=guider,
        sampler=graph.add("DPDMDSamplerSelect", method="deterministic"),
        sigmas=graph.add("DPDMDScheduler", model=model, steps=4, denoise=1.0, schedule="auto", custom=""),
        latent_image=empty(server, graph, SD3_SHAPE),
    )

    def first_then_rest(latents, level):
        if level.sigma < 1:
            return sd3_denoiser(network, sd3_prompt)(latents, level)
        cond, uncond = (sd3_denoiser(tiny_sd3, prompt)(latents, level) for prompt in (sd3_prompt, negative))
        return uncond + 3.5 * (cond - uncond)

    with torch.no_grad():
        noise = noise_from_seeds([SEED, SEED + 1, SEED + 2], SD3_SHAPE)
        expected = rollout(first_then_rest, noise, flow_schedule(TRAINED))
    for _again in range(2):
        close(sd3_latents(server.latents(graph, latent)), expected, 1e-4)
    assert len(Path(calls).read_text().split("\n")) - 1 == 3  # the student is called in its own steps alone


# ---- cost, progress, interruption


@pytest.mark.parametrize("per_image_seed", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_picture_takes_exactly_its_steps_in_network_calls(server, sd3_file, sd3_prompt, steps, per_image_seed):
    graph, calls = Graph(), server.file(".calls")
    model = graph.add("TestCountCalls", model=stock(graph, sd3_file), seconds=0.0, path=calls)
    widgets = {"steps": steps, "per_image_seed": per_image_seed}
    latent = empty(server, graph, SD3_SHAPE)
    server.latents(graph, sampled(graph, model, prompted(server, graph, sd3_prompt), latent, **widgets))
    levels = {1: ["1"], 4: ["1", "0.857692", "0.602151", "0.00892857"]}[steps]
    pictures = ["1"] * 3 if per_image_seed else ["3"]  # on a CPU pictures with seeds of their own go one by one
    expected = [f"{level} {count}" for level in levels for count in pictures]
    assert Path(calls).read_text().split("\n")[:-1] == expected


def watched(server, graph, on_progress=lambda value: None):
    """Run a workflow and collect what the page is sent: steps reported, previews, texts."""
    import aiohttp

    async def listen():
        seen = {"progress": [], "previews": 0, "texts": []}
        address = f"http://127.0.0.1:{server.port}/ws?clientId=watcher"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt = server.queue(graph, "watcher")
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind = struct.unpack(">I", message.data[:4])[0]
                    if kind == 3:
                        length = struct.unpack(">I", message.data[4:8])[0]
                        seen["texts"].append(message.data[8 + length :].decode())
                    seen["previews"] += kind == 1
                    continue
                event = json.loads(message.data)
                if event["type"] == "progress":
                    seen["progress"].append((event["data"]["value"], event["data"]["max"]))
                    on_progress(event["data"]["value"])
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return seen | {"end": event["type"], "prompt": prompt}

    return asyncio.run(asyncio.wait_for(listen(), timeout=300))


def test_every_step_shows_progress_and_a_preview_and_the_node_tells_its_schedule(server, sd3_student, sd3_prompt):
    graph = Graph()
    latent = empty(server, graph, SD3_SHAPE)
    latent = sampled(graph, loaded(graph, sd3_student), prompted(server, graph, sd3_prompt), latent, seed=4321)
    graph.add("TestSaveLatent", latent=latent, path=server.file(".safetensors"))
    seen = watched(server, graph)
    assert seen["end"] == "execution_success" and seen["previews"] == 4
    assert seen["progress"] == [(step, 4) for step in (1, 2, 3, 4)]
    assert "4 steps, deterministic: 1, 0.9, 0.6, 0.3, 0 (from the student's file)" in seen["texts"]


def test_an_interrupted_run_stops_between_its_steps(server, sd3_file, sd3_prompt):
    graph, calls = Graph(), server.file(".calls")
    model = graph.add("TestCountCalls", model=stock(graph, sd3_file), seconds=0.3, path=calls)
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), empty(server, graph, SD3_SHAPE, 1), steps=16)
    graph.add("TestSaveLatent", latent=latent, path=server.file(".safetensors"))
    seen = watched(server, graph, lambda value: server.post("interrupt", {}) if value == 1 else None)
    assert seen["end"] == "execution_interrupted" and len(Path(calls).read_text().split()) < 2 * 8
    server.latents(graph_of_one_picture(server, sd3_file, sd3_prompt), ["3", 0])  # and the server goes on


def graph_of_one_picture(server, name, prompt):
    """A small workflow that works; its third node is to be saved."""
    graph = Graph()
    model, positive = stock(graph, name), prompted(server, graph, prompt)
    latent = empty(server, graph, SD3_SHAPE, 1)
    sampled(graph, model, positive, latent, steps=1)
    graph.nodes["3"], graph.nodes["4"] = graph.nodes["4"], graph.nodes["3"]
    graph.nodes["3"]["inputs"]["latent_image"] = ["4", 0]
    return graph


# ---- bad input: a message in the node, and the server goes on


def bad_file(kind):
    """What is wrong with a file, as a function that makes it."""

    def make(server, network):
        state, header = network.state_dict(), dict(HEADER)
        path = at(server, f"diffusion_models/{kind.replace(' ', '_')}.{'pt' if 'pickle' in kind else 'safetensors'}")
        if kind == "junk":
            path.write_bytes(b"this is no safetensors file at all")
        elif kind == "truncated":
            save_file(state, path, header)
            path.write_bytes(path.read_bytes()[:-1000])
        elif kind == "pickle with code":
            torch.save({"state_dict": state, "hook": os.system}, path)
        elif kind == "junk pickle":
            path.write_bytes(b"nothing that torch wrote")
        else:
            changes = {
                "newer format": ({}, {"dpdmd.format": "2"}),
                "rising levels": ({}, {"dpdmd.sigmas": "[1.0, 0.5, 0.75, 0.0]"}),
                "levels above zero": ({}, {"dpdmd.sigmas": "[1.0, 0.5, 0.25]"}),
                "wrong family": ({}, {"dpdmd.family": "sdxl"}),
                "leftover key": ({"extra.weight": torch.ones(2)}, {}),
                "missing key": ({"proj_out.bias": None}, {}),
                "wrong size": ({"context_embedder.weight": torch.ones(64, 32)}, {}),
                "unknown network": (dict.fromkeys(state) | {"a.weight": torch.ones(2), "b": torch.ones(2)}, {}),
            }[kind]
            state = {key: value for key, value in (state | changes[0]).items() if value is not None}
            save_file(state, path, header | changes[1])
        return f"diffusion_models/{path.name}"

    return make


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("junk", r"junk.safetensors is no whole safetensors file.*export it again"),
        ("truncated", r"truncated.safetensors is no whole safetensors file.*export it again"),
        ("pickle with code", r"pickle_with_code.pt holds more than weights.*was not run.*as .safetensors"),
        ("junk pickle", r"junk_pickle.pt (holds more than weights|is no whole torch file)"),
        ("newer format", r"dpdmd.format is '2', this pack reads '1': update the DP-DMD node pack"),
        ("rising levels", r"dpdmd.sigmas is \[1.0, 0.5, 0.75, 0.0\].*does not fall.*export the student again"),
        ("levels above zero", r"dpdmd.sigmas is \[1.0, 0.5, 0.25\].*does not fall.*export the student again"),
        ("wrong family", r"the header says sdxl, the weights are sd3"),
        ("leftover key", r"has 1 keys that the network lacks \(extra.weight\): export it again"),
        ("missing key", r"lacks 1 of \d+ keys \(proj_out.bias\): export it again"),
        ("wrong size", r"wrong_size.safetensors does not fit its network.*export it again"),
        ("unknown network", r"no network that ComfyUI knows \(keys a.weight, b\)"),
    ],
)
def test_a_bad_student_is_refused_in_the_node(server, tiny_sd3, sd3_file, sd3_prompt, kind, message):
    name = bad_file(kind)(server, tiny_sd3)
    graph = Graph()
    graph.add("TestSaveText", text=[loaded(graph, name)[0], 1], path=server.file(".txt"))
    with pytest.raises(RefusedError, match=message):
        server.run(graph)
    server.latents(graph_of_one_picture(server, sd3_file, sd3_prompt), ["3", 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("another family", r"is a LoRA for sdxl, base_model is sd3: connect the sdxl model"),
        ("no match", r"none of its 1 modules is in the base model \(transformer.other.layer\).*connect the model"),
        ("leftover", r"the base model lacks 1 modules \(transformer.other.layer\): export it again"),
        ("no factor", r"only one factor of 1 modules \(transformer.proj_out\): export it again"),
        ("not a lora's key", r"1 keys of no LoRA \(text_encoder.weight\): export it again"),
        ("another size", r"is for a weight of \[128, 3\], the base model's is \[128, 128\]: connect the model"),
        ("no base", r"is a LoRA: connect the model it was trained on to base_model"),
        ("fp8", r"weight_dtype is fp8_e4m3fn, but .* is a LoRA: choose it at the base model"),
    ],
)
def test_a_bad_lora_is_refused_in_the_node(server, tiny_sd3, sd3_file, change, message):
    state, header, inputs = renamed(adapter(tiny_sd3, SD3_MODULES[:1]), "transformer."), {"dpdmd.kind": "lora"}, {}
    other = {f"transformer.other.layer.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"}
    if change == "another family":
        header |= SDXL_HEADER
    elif change == "no match":
        state = other
    elif change == "leftover":
        state |= other
    elif change == "no factor":
        state["transformer.proj_out.lora_A.weight"] = torch.ones(4, 4)
    elif change == "not a lora's key":
        state["text_encoder.weight"] = torch.ones(4)
    elif change == "another size":
        state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(4, 3)
    elif change == "fp8":
        inputs["weight_dtype"] = "fp8_e4m3fn"
    header = header if change == "another family" else HEADER | header
    name = place(server, "loras/bad.safetensors", state, header | {"dpdmd.kind": "lora"})
    graph = Graph()
    if change != "no base":
        inputs["base_model"] = stock(graph, sd3_file)
    graph.add("TestSaveText", text=[loaded(graph, name, **inputs)[0], 1], path=server.file(".txt"))
    with pytest.raises(RefusedError, match=message):
        server.run(graph)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"denoise": 0.1}, r"denoise 0.1 leaves none of 4 steps: raise it to 0.125 or more"),
        ({"denoise": 0.0}, r"denoise 0 leaves none of 4 steps"),
        ({"steps": 5}, r"steps is 5, the student was trained for 4: set steps to 4 or fewer"),
        ({"steps": 17}, r"bigger than max.*steps"),
        ({"steps": 0}, r"smaller than min.*steps"),
        ({"sigmas": "1, 0.5, 0.7, 0"}, r"sigmas \[1, 0.5, 0.7, 0\] must fall"),
        ({"sigmas": "1, 0.5"}, r"sigmas \[1, 0.5\] end at 0.5: end at 0"),
        ({"sigmas": "2, 1, 0"}, r"sigmas \[2, 1, 0\] start above 1, this model's noisiest level"),
        ({"sigmas": "0"}, r"sigmas \[0\] leave no step"),
        ({"shape": (4, 16, 16)}, r"latent_image has shape \[1, 4, 16, 16\], this model needs \[pictures, 16, height"),
        ({"shape": (16, 2, 16, 16)}, r"latent_image has shape \[1, 16, 2, 16, 16\]"),
    ],
)
def test_bad_values_are_refused_in_the_sampler(server, sd3_student, sd3_file, sd3_prompt, inputs, message):
    graph = Graph()
    model, inputs = loaded(graph, sd3_student), dict(inputs)
    latent = graph.add("TestLatent", path=server.given(samples=torch.ones(1, *inputs.pop("shape", SD3_SHAPE))))
    if "sigmas" in inputs:
        inputs["sigmas"] = graph.add("ManualSigmasForTests", text=inputs["sigmas"], path="")
    latent = sampled(graph, model, prompted(server, graph, sd3_prompt), latent, **inputs)
    with pytest.raises(RefusedError, match=message):
        server.latents(graph, latent)
    server.latents(graph_of_one_picture(server, sd3_file, sd3_prompt), ["3", 0])


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"schedule": "SDXL trailing"}, r"'SDXL trailing' does not fit a model that predicts flow: choose SD3.5"),
        ({"schedule": "custom", "custom": "1, x, 0"}, r"custom sigmas '1, x, 0' are not numbers: write them like"),
        ({"schedule": "custom", "custom": ""}, r"custom sigmas '' are not numbers"),
        ({"denoise": 0.05}, r"denoise 0.05 leaves none of 4 steps"),
    ],
)
def test_bad_values_are_refused_in_the_scheduler(server, sd3_student, inputs, message):
    graph = Graph()
    widgets = {"steps": 4, "denoise": 1.0, "schedule": "auto", "custom": ""} | inputs
    sigmas = graph.add("DPDMDScheduler", model=loaded(graph, sd3_student), **widgets)
    graph.add("TestSaveSigmas", sigmas=sigmas, path=server.file(".safetensors"))
    with pytest.raises(RefusedError, match=message):
        server.run(graph)


@pytest.mark.parametrize("name", ["diffusion_models/../../../secret.safetensors", "/etc/passwd", "loras/none.pt"])
def test_a_name_that_is_not_in_the_list_is_refused(server, name):
    graph = Graph()
    graph.add("TestSaveText", text=[loaded(graph, name)[0], 1], path=server.file(".txt"))
    with pytest.raises(RefusedError, match="not in list.*student_name|student_name.* is not in"):
        server.run(graph)


def test_a_teacher_of_another_family_is_refused(server, sd3_file, sdxl_file, sd3_prompt):
    graph = Graph()
    prompt = prompted(server, graph, sd3_prompt)
    guider = graph.add(
        "DPDMDFirstStepGuider",
        student=stock(graph, sd3_file),
        teacher=stock(graph, sdxl_file),
        positive=prompt,
        negative=prompt,
        teacher_steps=1,
        teacher_cfg=3.5,
    )
    latent = graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DPDMDNoise", noise_seed=SEED),
        guider=guider,
        sampler=graph.add("DPDMDSamplerSelect", method="deterministic"),
        sigmas=graph.add("ManualSigmasForTests", text="1, 0.5, 0", path=""),
        latent_image=empty(server, graph, SD3_SHAPE),
    )
    with pytest.raises(RefusedError, match="student and teacher differ: sd3 flow SD3 and sdxl eps SDXL: connect"):
        server.latents(graph, latent)


def test_a_sampling_that_no_student_has_is_refused(server, sdxl_file, sdxl_prompt):
    graph = Graph()
    model = graph.add("ModelSamplingDiscrete", model=stock(graph, sdxl_file), sampling="lcm", zsnr=False)
    latent = sampled(graph, model, prompted(server, graph, sdxl_prompt), empty(server, graph, SDXL_SHAPE))
    with pytest.raises(RefusedError, match=r"the model is sampled by .*LCM.*: remove the model-sampling node"):
        server.latents(graph, latent)
