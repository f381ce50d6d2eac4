"""Workflows of the server tests: their nodes, their files, and the oracles that their latents are compared with.

`-rP` prints how close the latents are.
"""

import copy
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from comfy_server import Graph
from safetensors.torch import load_file, save_file

from dpdmd_pipeline.dpdmd.noise import add_noise, flow_schedule, vp_schedule, x0_from_eps, x0_from_velocity
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

SD3_SHAPE, SDXL_SHAPE = (16, 16, 24), (4, 16, 24)
SDXL_SCALE = 0.13025  # of the VAE: a LATENT times this is the network's input
SEED = 7
SEEDS = [SEED, SEED + 1, SEED + 2]
OFFICIAL, TRAILING = "SD3.5 official (diffusers flow)", "SDXL trailing"  # names of the published schedules
PUBLISHED = [1.0, 0.857692, 0.602151, 0.008929, 0.0]
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
SD3_MODULES = [
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.add_v_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.attn2.to_k",
    "transformer_blocks.1.ff.net.0.proj",
    "transformer_blocks.1.norm1.linear",
]


def require_comfyui():
    """Skip the calling module unless COMFYUI_PATH is set (COMFY_PYTHON: ComfyUI's interpreter, if it has its own)."""
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: no ComfyUI to test in", allow_module_level=True)


def comfyui_version():
    """Version of the checkout in COMFYUI_PATH."""
    file = Path(os.environ.get("COMFYUI_PATH", "")) / "comfyui_version.py"
    return re.search(r'"(.+)"', file.read_text())[1] if file.is_file() else "unknown"


# ---- files


def model_path(server, name):
    return server.base / "models" / name


def save_weights(server, name, state, metadata=None):
    """Put weights into the server's models folder; returns their name in Load DP-DMD Student."""
    tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
    save_file(tensors, model_path(server, name), metadata)
    return name


def export_small_student(folder, models, title, teacher=None):
    """Export a student of the embedded world's sizes, and copy it to where the guide says.

    Args:
        folder: an empty folder for the export.
        models: ComfyUI's folder of models.
        title: name of the student's file and of its pipeline.
        teacher: pipeline whose trained network is the student; None: random weights.
    """
    from dpdmd_pipeline.backbones.student_header import StudentHeader
    from dpdmd_pipeline.exporting.formats import Export, Licence, Student
    from dpdmd_pipeline.shapes.models import make_pipeline

    if teacher is None:
        teacher = folder / "teacher"
        make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(teacher)
        weights = make_pipeline(max_length=12, shift=1.0, seed=1).transformer.state_dict()
    else:
        weights = load_file(teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    header = StudentHeader("sd3", [1.0, 0.75, 0.5, 0.25, 0.0], shift=1.0, resolution=32, max_sequence_length=0)
    student, licence = Student(header, weights, None), Licence("apache-2.0", None, None)
    forms = ["diffusers", "comfyui"]
    export = Export(student, teacher, title, forms, "float32", licence, None, {}, measure="")
    export.write(folder)
    file = models / "diffusion_models" / f"{title}.safetensors"
    file.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / export.files["comfyui"], file)
    shutil.copytree(folder / "diffusers", models / "diffusers" / title)


def random_lora(network, modules, rank=4, seed=0):
    """Random LoRA factors in PEFT's spelling."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for module in modules:
        weight = network.get_submodule(module).weight
        state[f"{module}.lora_A.weight"] = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
        tail = (1,) * (weight.ndim - 2)
        state[f"{module}.lora_B.weight"] = 0.2 * torch.randn(len(weight), rank, *tail, generator=generator)
    return state


def merge_lora(network, state, scale):
    """A copy of the network with the LoRA in its weights."""
    network = copy.deepcopy(network)
    for key in state:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            up, down = (state[f"{module}.lora_{factor}.weight"].flatten(1) for factor in "BA")
            weight = network.get_submodule(module).weight
            weight.data += scale * (up @ down).view_as(weight)
    return network


def respell(state, spelling):
    """A LoRA with its keys in another trainer's spelling."""
    if spelling == "kohya":
        suffixes = {".lora_A.weight": ".lora_down.weight", ".lora_B.weight": ".lora_up.weight"}
        return {"lora_unet_" + key[:-14].replace(".", "_") + suffixes[key[-14:]]: value for key, value in state.items()}
    if spelling == "peft with adapter name":
        return {f"base_model.model.{key[:-7]}.default.weight": value for key, value in state.items()}
    return {f"{spelling}{key}": value for key, value in state.items()}


# ---- nodes


def load_student(graph, name, **inputs):
    return graph.add("DPDMDLoader", student_name=name, **{"weight_dtype": "default", "strength": 1.0} | inputs)


def load_stock(graph, name):
    return graph.add("UNETLoader", unet_name=name.removeprefix("diffusion_models/"), weight_dtype="default")


def empty_latent(server, graph, shape, count=3, **extra):
    return graph.add("TestLatent", path=server.tensor_file(samples=torch.zeros(count, *shape), **extra))


def conditioning(server, graph, prompt):
    return graph.add("TestConditioning", path=server.tensor_file(**prompt))


def scheduler(graph, model, **inputs):
    widgets = {"steps": 4, "denoise": 1.0, "schedule": "auto", "custom": ""}
    return graph.add("DPDMDScheduler", model=model, **widgets | inputs)


def sample(graph, model, prompt, latent, **inputs):
    widgets = {"seed": SEED, "steps": 4, "denoise": 1.0, "method": "auto", "per_image_seed": True}
    return graph.add("DPDMDSampler", model=model, positive=prompt, latent_image=latent, **widgets | inputs)


def sample_with_parts(graph, latent, *, guider, sigmas, method="deterministic"):
    """SamplerCustomAdvanced with this pack's noise and sampler."""
    return graph.add(
        "SamplerCustomAdvanced",
        noise=graph.add("DPDMDNoise", noise_seed=SEED),
        guider=guider,
        sampler=graph.add("DPDMDSamplerSelect", method=method),
        sigmas=sigmas,
        latent_image=latent,
    )


def draw(server, load, prompt, *, shape=SD3_SHAPE, count=3, latent=None, schedule=None, **inputs):
    """A LATENT of DP-DMD Sampler.

    Args:
        load: adds a loader to a graph and returns its model.
        latent: tensors of the input LATENT, which is empty without them.
        schedule: of a DP-DMD Scheduler for the sampler, for a model without a header.
        inputs: other inputs of the sampler; `sigmas` may be a list of numbers.
    """
    graph = Graph()
    tensors = {"samples": torch.zeros(count, *shape)} | (latent or {})
    start = graph.add("TestLatent", path=server.tensor_file(**tensors))
    model = load(graph)
    if isinstance(inputs.get("sigmas"), list):
        levels = ", ".join(str(level) for level in inputs["sigmas"])
        inputs["sigmas"] = scheduler(graph, model, schedule="custom", custom=levels)
    if schedule is not None:
        inputs["sigmas"] = scheduler(graph, model, schedule=schedule, steps=inputs.get("steps", 4))
    return server.latents(graph, sample(graph, model, conditioning(server, graph, prompt), start, **inputs))


def student(name, **inputs):
    """A loader for `draw`."""
    return lambda graph: load_student(graph, name, **inputs)


def stock(name):
    """A loader for `draw`."""
    return lambda graph: load_stock(graph, name)


def sd3_units(latent):
    """Convert ComfyUI's LATENT to the network's input."""
    return (latent - 0.0609) * 1.5305


# ---- oracles


def diffusers_sd3(transformer, prompt, noise):
    """Latents of StableDiffusion3Pipeline with the published scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    unused = [f"{kind}{n}" for kind in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return _run_pipeline(
        StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, vae=None, **dict.fromkeys(unused)),
        prompt,
        noise,
    )


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
    unused = dict.fromkeys(["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
    pipeline = StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, add_watermarker=False, **unused)
    return _run_pipeline(pipeline, prompt, noise)


def _run_pipeline(pipeline, prompt, noise):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        num_inference_steps=4,
        guidance_scale=1.0,
        prompt_embeds=prompt["prompt_embeds"].expand(len(noise), -1, -1),
        pooled_prompt_embeds=prompt["pooled_embeds"].expand(len(noise), -1),
        latents=noise,
        output_type="latent",
        height=8 * noise.shape[-2],
        width=8 * noise.shape[-1],
    ).images


def sd3_denoiser(transformer, prompt):
    """An SD3 as a denoiser for our own sampler."""

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
def our_latents(transformer, prompt, sigmas, seeds=SEEDS):
    """Latents of dpdmd_pipeline's sampler."""
    return rollout(sd3_denoiser(transformer, prompt), noise_from_seeds(seeds, SD3_SHAPE), flow_schedule(sigmas))


@torch.no_grad()
def x0_sampling(unet, prompt, seeds):
    """Multistep x0 sampling of an SDXL: each picture's generator gives its start, then its fresh noise."""
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


def assert_close(latents, expected, tolerance):
    difference = (latents - expected).abs().max().item()
    print(f"ComfyUI {comfyui_version()}: largest difference {difference:.1e}, latents up to {expected.abs().max():.3g}")
    assert difference <= tolerance, f"largest difference {difference:.2e}, allowed {tolerance:.0e}"
