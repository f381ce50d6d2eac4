"""Students of Klein, Qwen-Image and Z-Image on a real ComfyUI, against this project's sampler.

Whole, as a LoRA, with a teacher start, and in Seeds at a Glance.
"""

from collections.abc import Callable
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from test_server_examples import run_example, with_small_models
from tests.raising import refuses
from workflows import (
    HEADER,
    SEEDS,
    TRAINED,
    assert_close,
    comfyui_version,
    conditioning,
    draw,
    empty_latent,
    load_stock,
    load_student,
    merge_lora,
    random_lora,
    require_comfyui,
    respell,
    save_weights,
    student,
)

from dpdmd_pipeline.backbones.flux2_klein import Flux2Klein
from dpdmd_pipeline.backbones.qwen_image import QwenImage
from dpdmd_pipeline.backbones.z_image import ZImage
from dpdmd_pipeline.dpdmd.noise import flow_schedule
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.exporting.comfyui import comfyui_weights

require_comfyui()


def noise(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


START = {"teacher_steps": 3, "landing": 1, "teacher_cfg": 3.5}


def make_z_image():
    from diffusers import ZImageTransformer2DModel
    from diffusers.models.transformers.transformer_z_image import TimestepEmbedder

    network = ZImageTransformer2DModel(dim=384, n_layers=2, n_heads=3, n_kv_heads=3, cap_feat_dim=32)
    network.t_embedder = TimestepEmbedder(256, mid_size=384)  # ComfyUI's is at most as wide as the network
    return network


def make_qwen_image():
    from diffusers import QwenImageTransformer2DModel

    sizes = {"num_attention_heads": 1, "attention_head_dim": 64, "joint_attention_dim": 32}
    return QwenImageTransformer2DModel(num_layers=2, axes_dims_rope=(16, 24, 24), **sizes)


def make_klein():
    from diffusers import Flux2Transformer2DModel

    sizes = {"num_attention_heads": 1, "attention_head_dim": 128, "joint_attention_dim": 32}
    return Flux2Transformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=False, **sizes)


def wan_units(latent):
    """ComfyUI's LATENT of Qwen-Image, a video of one frame, as the network's input."""
    from diffusers import AutoencoderKLQwenImage

    config = AutoencoderKLQwenImage().config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean, config.latents_std))
    return (latent.squeeze(2) - mean) / std


class Family(NamedTuple):
    """A family's tiny network of the real class, of sizes that ComfyUI or the test nodes detect."""

    kind: Any  # the backbone's class
    make: Callable[[], torch.nn.Module]
    modules: list[str]  # of a LoRA
    shape: tuple[int, ...]  # of ComfyUI's LATENT
    units: Callable[[torch.Tensor], torch.Tensor]  # ComfyUI's LATENT as the network's input
    tokens: int = 20


FAMILIES = {
    "flux2_klein": Family(
        Flux2Klein,
        make_klein,
        [
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.1.attn.add_v_proj",
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.0.ff.linear_in",
            "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
            "single_transformer_blocks.1.attn.to_out",
        ],
        (128, 8, 12),
        lambda latent: latent,
        512,  # ComfyUI pads shorter prompts with zeros
    ),
    "qwen_image": Family(
        QwenImage,
        make_qwen_image,
        [
            "transformer_blocks.0.attn.to_q",
            "transformer_blocks.0.attn.to_out.0",
            "transformer_blocks.1.attn.add_v_proj",
            "transformer_blocks.1.img_mlp.net.2",
        ],
        (16, 1, 16, 24),
        wan_units,
    ),
    "z_image": Family(
        ZImage,
        make_z_image,
        ["layers.0.attention.to_q", "layers.1.attention.to_out.0", "noise_refiner.0.feed_forward.w1"],
        (16, 16, 24),
        lambda latent: (latent - 0.1159) * 0.3611,
    ),
}
ABSENT = []  # families that this ComfyUI lacks
if comfyui_version().startswith("0.3."):
    ABSENT = ["flux2_klein", "z_image"]
    FAMILIES = {"qwen_image": FAMILIES["qwen_image"]}


class World:
    """Networks, prompts and files of one family."""

    def __init__(self, server, name):
        self.server, self.name, self.family = server, name, FAMILIES[name]
        self.header = HEADER | {"dpdmd.family": name}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.base = self.family.make().eval()
            for parameter in self.base.parameters():
                parameter.data.add_(0.02 * torch.randn(parameter.shape))
        adapter = random_lora(self.base, self.family.modules)
        self.few_step = merge_lora(self.base, adapter, 1.0)
        tokens = (1, self.family.tokens, 32)
        self.prompt, self.negative = (
            {"prompt_embeds": noise(*tokens, seed=seed), "pooled_embeds": noise(1, 16, seed=2)} for seed in (1, 3)
        )
        lora = {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
        self.lora = save_weights(
            server, f"loras/{name}.safetensors", respell(adapter, "transformer."), self.header | lora
        )
        self.full = self.save("full", self.few_step, self.header)

    def save(self, title, network, header=None):
        weights = comfyui_weights(self.name, network.state_dict())
        return save_weights(self.server, f"diffusion_models/{self.name}_{title}.safetensors", weights, header)

    @cached_property
    def base_file(self):
        """The base model without a header."""
        return self.save("base", self.base)

    def load(self, form):
        if form == "full":
            return student(self.full)
        return lambda graph: load_student(graph, self.lora, base_model=load_stock(graph, self.base_file))

    def denoiser(self, network, prompt):
        """The backbone's own call of the network."""
        backbone = SimpleNamespace(dtype=torch.float32, device="cpu")
        backbone._positions = partial(Flux2Klein._positions, backbone)
        cond = {"prompt_embeds": prompt["prompt_embeds"].expand(3, -1, -1)}
        cond["prompt_mask"] = torch.ones(3, self.family.tokens)
        return lambda latents, level: self.family.kind.denoise(backbone, network, latents, level, cond)

    @torch.no_grad()
    def expected(self, latents=None, levels=TRAINED):
        latents = self.noise() if latents is None else latents
        return rollout(self.denoiser(self.few_step, self.prompt), latents, flow_schedule(levels))

    def noise(self):
        channels, *_, height, width = self.family.shape
        return noise_from_seeds(SEEDS, (channels, height, width))

    def assert_equal(self, latents, expected):
        """Compare a LATENT relative to the latents' size: they are larger than 1."""
        assert_close(self.family.units(latents), expected, 1e-5 * expected.abs().max().item())


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, server):
    return World(server, request.param)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_student_gives_our_samplers_latents(server, world, form):
    shape = world.family.shape
    latents = draw(server, world.load(form), world.prompt, shape=shape)
    world.assert_equal(latents, world.expected())
    alone = draw(server, world.load(form), world.prompt, shape=shape, count=1, seed=SEEDS[2])
    assert torch.equal(latents[2:], alone)


def test_comfyuis_own_loader_and_the_schedulers_levels_give_the_same(server, world):
    """The file has ComfyUI's own keys: no node of the pack is needed to load it."""
    load = student(world.full)
    graph = Graph()
    sigmas = graph.add("DPDMDScheduler", model=load(graph), steps=4, denoise=1.0, schedule="auto", custom="")
    graph.add("TestSaveSigmas", sigmas=sigmas, path=(path := server.file(".safetensors")))
    server.run(graph)
    levels = load_file(path)["sigmas"]
    torch.testing.assert_close(levels, torch.tensor(TRAINED))
    stock = draw(
        server,
        lambda graph: load_stock(graph, world.full),
        world.prompt,
        shape=world.family.shape,
        sigmas=levels.tolist(),
    )
    assert torch.equal(stock, draw(server, load, world.prompt, shape=world.family.shape))


def test_a_teacher_start_gives_our_samplers_latents(server, world):
    graph = Graph()
    latent = empty_latent(server, graph, world.family.shape)
    conds = [conditioning(server, graph, prompt) for prompt in (world.prompt, world.negative)]
    models = {"base_model": load_stock(graph, world.base_file), "few_step_model": world.load("lora")(graph)}
    prompts = dict(zip(("positive", "negative"), conds, strict=True))
    widgets = START | {"method": "auto", "per_image_seed": True}
    node = graph.add("DPDMDTeacherStart", latent_image=latent, seed=SEEDS[0], **models, **prompts, **widgets)

    def guided(latents, level):  # as ComfyUI guides every family
        cond, uncond = (world.denoiser(world.base, prompt)(latents, level) for prompt in (world.prompt, world.negative))
        return uncond + 3.5 * (cond - uncond)

    with torch.no_grad():
        levels = flow_schedule([*torch.linspace(1, TRAINED[1], 4).tolist(), 0.0])[:-1]
        latents = rollout(guided, world.noise(), levels)
    world.assert_equal(server.latents(graph, node), world.expected(latents, TRAINED[1:]))


def test_seeds_at_a_glance_finishes_the_chosen_seed(server, world):
    graph = Graph()
    sockets = {
        "few_step_model": world.load("full")(graph),
        "positive": conditioning(server, graph, world.prompt),
        "latent_image": empty_latent(server, graph, world.family.shape, 2),
        "vae": graph.add("TestVAE", path=""),
    }
    widgets = START | {"seed": SEEDS[0], "count": 3, "steps": "1", "pick": 3, "method": "auto"}
    finished = server.latents(graph, graph.add("DPDMDSeeds", **sockets, **widgets))
    alone = draw(server, world.load("full"), world.prompt, shape=world.family.shape, count=1, seed=SEEDS[2])
    assert torch.equal(finished, alone)


@pytest.mark.parametrize("form", ["full", "lora"])
def test_a_student_of_another_family_is_refused(server, world, sd3_file, sd3_prompt, form):
    if form == "full":
        load, facts = student(world.save("wrong", world.few_step, HEADER)), ("header", "sd3", world.name)
    else:

        def load(graph):
            return load_student(graph, world.lora, base_model=load_stock(graph, sd3_file))

        facts = (world.name, "base_model is sd3")
    with refuses(RefusedError, *facts):
        draw(server, load, sd3_prompt)
    draw(server, student(world.full), world.prompt, shape=world.family.shape, count=1)


def test_the_example_runs_with_a_small_network(server, world):
    files = {"UNETLoader": ("unet_name", world.base_file), "DPDMDLoader": ("student_name", world.lora)}
    prompt_file = server.tensor_file(**world.prompt)

    def small(node, number):
        if node["class_type"] in files:
            widget, file = files[node["class_type"]]
            node["inputs"][widget] = file.removeprefix("diffusion_models/")
            return node
        return with_small_models(node, number, family=world.name, prompt_file=prompt_file)

    assert len(run_example(server, f"{world.name}_lora", small)) == 4


@pytest.mark.parametrize("name", ABSENT)
def test_a_student_of_a_family_that_this_comfyui_lacks_is_refused(server, sd3_prompt, name):
    state = {"proj_out.weight": torch.ones(2, 2)}
    file = save_weights(server, f"diffusion_models/{name}.safetensors", state, HEADER | {"dpdmd.family": name})
    with refuses(RefusedError, name, "update ComfyUI"):
        draw(server, student(file), sd3_prompt)
