"""Families whose latents have a dimension of frames, [B, C, T, H, W], on a real ComfyUI: Qwen-Image and Wan."""

import json
from pathlib import Path

import pytest
import torch
from comfy_server import Graph
from safetensors.torch import load_file
from workflows import SEED, assert_close, conditioning, empty_latent, require_comfyui, sample

require_comfyui()

ONE, TWO = (16, 1, 16, 24), (16, 2, 16, 24)  # a picture; a film of two latent frames
KINDS = pytest.mark.parametrize(("family", "shape"), [("QwenImage", ONE), ("Wan", ONE), ("Wan", TWO)])
START = {"teacher_steps": 2, "landing": 1, "teacher_cfg": 1.0}


class Frames:
    """A workflow with two small networks of a family, a prompt, a schedule and latents of a shape."""

    def __init__(self, server, family, shape, prompt):
        self.server, self.graph, self.shape = server, Graph(), shape
        self.few_step, self.base = (
            self.graph.add("TestTinyModel", family=family, seed=seed, path="") for seed in (1, 2)
        )
        self.prompt = conditioning(server, self.graph, prompt)
        self.sigmas = self.graph.add("BasicScheduler", model=self.few_step, scheduler="simple", steps=4, denoise=1.0)

    def latent(self, count):
        return empty_latent(self.server, self.graph, self.shape, count)

    def sampler(self, count=3, **inputs):
        latent = self.latent(count)
        node = sample(self.graph, self.few_step, self.prompt, latent, sigmas=self.sigmas, **inputs)
        return self.server.latents(self.graph, node)

    def teacher_start(self, count=3, **inputs):
        models = {"base_model": self.base, "few_step_model": self.few_step, "positive": self.prompt}
        widgets = {"seed": SEED, "method": "auto", "per_image_seed": True, "sigmas": self.sigmas} | START
        node = self.graph.add("DPDMDTeacherStart", latent_image=self.latent(count), **models | widgets | inputs)
        return self.server.latents(self.graph, node)


@pytest.fixture
def frames(server, family, shape, sd3_prompt):
    return Frames(server, family, shape, sd3_prompt)


@KINDS
def test_the_sampler_equals_comfyuis_own(frames):
    add, latent = frames.graph.add, frames.latent(3)
    stock = add(
        "SamplerCustomAdvanced",
        noise=add("RandomNoise", noise_seed=SEED),
        guider=add("BasicGuider", model=frames.few_step, conditioning=frames.prompt),
        sampler=add("KSamplerSelect", sampler_name="euler"),
        sigmas=frames.sigmas,
        latent_image=latent,
    )
    latents = frames.sampler(per_image_seed=False)
    assert latents.shape == (3, *frames.shape)
    assert_close(latents, frames.server.latents(frames.graph, stock), 1e-6)


@KINDS
@pytest.mark.parametrize("method", ["deterministic", "re-noise"])
def test_a_picture_depends_only_on_its_seed_bit_for_bit(frames, method):
    for draw in (frames.sampler, frames.teacher_start):
        pictures = draw(method=method)
        assert torch.equal(pictures[2:], draw(count=1, method=method, seed=SEED + 2))


@KINDS
def test_seeds_at_a_glance_shows_them_and_finishes_the_chosen_one(frames):
    expected = frames.teacher_start(count=1, seed=SEED + 1)
    inputs = {"seed": SEED, "count": 3, "steps": "1", "pick": 2, "method": "auto", "latent_image": frames.latent(2)}
    models = {"few_step_model": frames.few_step, "base_model": frames.base, "positive": frames.prompt}
    vae = frames.graph.add("TestVAE", path="")
    node = frames.graph.add("DPDMDSeeds", vae=vae, sigmas=frames.sigmas, **inputs, **models, **START)
    diversity, numbers = frames.graph.add("DPDMDDiversity", samples=[node[0], 3]), frames.server.file(".txt")
    frames.graph.add("TestSaveNumber", number=diversity, path=numbers)
    path = frames.server.file(".safetensors")
    frames.graph.add("TestSaveLatent", latent=node, path=path)
    shown = frames.server.run(frames.graph)["outputs"][node[0]]["dpdmd_seeds"]
    assert [tile["label"] for tile in shown] == ["#1 seed 7", "#2 seed 8", "#3 seed 9"]
    assert torch.equal(load_file(path)["samples"], expected)
    assert 0.1 < json.loads(Path(numbers).read_text()) < 1.5
