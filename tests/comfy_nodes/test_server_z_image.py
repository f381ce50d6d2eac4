"""Students of Z-Image on a real ComfyUI, against this project's sampler: whole, as a LoRA, and with a teacher start."""

import copy
from types import SimpleNamespace

import pytest
import torch
from comfy_server import Graph, RefusedError
from tests.raising import refuses
from workflows import (
    HEADER,
    SD3_SHAPE,
    SEEDS,
    TRAINED,
    assert_close,
    comfyui_version,
    draw,
    load_stock,
    load_student,
    merge_lora,
    random_lora,
    require_comfyui,
    respell,
    save_weights,
    student,
)

from dpdmd_pipeline.backbones.z_image import ZImage
from dpdmd_pipeline.dpdmd.noise import flow_schedule
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

require_comfyui()
if comfyui_version().startswith("0.3."):
    pytest.skip("this ComfyUI has no Z-Image", allow_module_level=True)

Z_IMAGE = HEADER | {"dpdmd.family": "z_image", "dpdmd.shift": "6.0"}
LORA = Z_IMAGE | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
MODULES = ["layers.0.attention.to_q", "layers.1.attention.to_out.0", "noise_refiner.0.feed_forward.w1"]


@pytest.fixture(scope="module")
def network():
    """A tiny Z-Image with random weights, of the sizes that the test nodes add to ComfyUI."""
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ZImageTransformer2DModel(dim=384, n_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=32).eval()
        network.t_embedder = TimestepEmbedder(256, mid_size=384)  # ComfyUI's is at most as wide as the network
        for parameter in network.parameters():
            parameter.data.add_(0.02 * torch.randn(parameter.shape))
    return network


@pytest.fixture(scope="module")
def few_step(network):
    return merge_lora(network, random_lora(network, MODULES), 1.0)


@pytest.fixture(scope="module")
def files(server, network, few_step):
    """The base model without a header, a whole student and the same as a LoRA."""
    lora = respell(random_lora(network, MODULES), "transformer.")
    return SimpleNamespace(
        base=save_weights(server, "diffusion_models/z_base.safetensors", network.state_dict()),
        full=save_weights(server, "diffusion_models/z_full.safetensors", few_step.state_dict(), Z_IMAGE),
        lora=save_weights(server, "loras/z_lora.safetensors", lora, LORA),
    )


def as_lora(files):
    return lambda graph: load_student(graph, files.lora, base_model=load_stock(graph, files.base))


def denoiser(network, prompt):
    """The backbone's own call of the network, for a prompt of 20 tokens."""
    backbone = SimpleNamespace(dtype=torch.float32)
    cond = {"prompt_embeds": prompt["prompt_embeds"].expand(3, -1, -1), "prompt_mask": torch.ones(3, 20)}
    return lambda latents, level: ZImage.denoise(backbone, network, latents, level, cond)


def assert_equal(latents, expected):
    """Compare a LATENT, in the network's units, relative to the latents' size: they are larger than 1."""
    assert_close((latents - 0.1159) * 0.3611, expected, 1e-5 * expected.abs().max().item())


@torch.no_grad()
def our_latents(denoise, latents=None, levels=TRAINED):
    latents = noise_from_seeds(SEEDS, SD3_SHAPE) if latents is None else latents
    return rollout(denoise, latents, flow_schedule(levels))


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_student_gives_our_samplers_latents(server, files, few_step, sd3_prompt, form):
    load = student(files.full) if form == "full" else as_lora(files)
    latents = draw(server, load, sd3_prompt)
    assert_equal(latents, our_latents(denoiser(few_step, sd3_prompt)))
    alone = draw(server, load, sd3_prompt, count=1, seed=SEEDS[2])
    assert torch.equal(latents[2:], alone)


def test_a_teacher_start_gives_our_samplers_latents(server, files, network, few_step, sd3_prompt):
    negative = copy.deepcopy(sd3_prompt) | {"prompt_embeds": sd3_prompt["prompt_embeds"].flip(-1)}
    graph = Graph()
    latent = graph.add("TestLatent", path=server.tensor_file(samples=torch.zeros(3, *SD3_SHAPE)))
    conds = [graph.add("TestConditioning", path=server.tensor_file(**prompt)) for prompt in (sd3_prompt, negative)]
    start = {"teacher_steps": 3, "landing": 1, "teacher_cfg": 3.5, "method": "auto", "per_image_seed": True}
    models = {"base_model": load_stock(graph, files.base), "few_step_model": as_lora(files)(graph)}
    prompts = dict(zip(("positive", "negative"), conds, strict=True))
    node = graph.add("DPDMDTeacherStart", latent_image=latent, seed=SEEDS[0], **models, **prompts, **start)

    def guided(latents, level):
        cond, uncond = (denoiser(network, prompt)(latents, level) for prompt in (sd3_prompt, negative))
        return uncond + 3.5 * (cond - uncond)

    with torch.no_grad():
        levels = flow_schedule([*torch.linspace(1, TRAINED[1], 4).tolist(), 0.0])[:-1]
        latents = rollout(guided, noise_from_seeds(SEEDS, SD3_SHAPE), levels)
    expected = our_latents(denoiser(few_step, sd3_prompt), latents, TRAINED[1:])
    assert_equal(server.latents(graph, node), expected)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_student_of_another_family_is_refused(server, files, network, sd3_file, sd3_prompt, form):
    if form == "full":
        name = save_weights(server, "diffusion_models/wrong.safetensors", network.state_dict(), HEADER)
        load, facts = student(name), ("header", "sd3", "z_image")
    else:
        load, facts = (
            lambda graph: load_student(graph, files.lora, base_model=load_stock(graph, sd3_file)),
            (
                "z_image",
                "base_model is sd3",
            ),
        )
    with refuses(RefusedError, *facts):
        draw(server, load, sd3_prompt)
    draw(server, student(files.full), sd3_prompt, count=1)
