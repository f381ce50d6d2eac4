"""Seeds at a Glance and Diversity on a real ComfyUI."""

import json
from pathlib import Path

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    HEADER,
    SD3_SHAPE,
    SEED,
    conditioning,
    empty_latent,
    load_stock,
    load_student,
    require_comfyui,
    sample,
    save_weights,
)

require_comfyui()


@pytest.fixture(scope="module")
def student(server, tiny_sd3):
    state = {key: value + 0.02 * torch.randn(value.shape) for key, value in tiny_sd3.state_dict().items()}
    return save_weights(server, "diffusion_models/seeds.safetensors", state, HEADER)


class Seeds:
    """A workflow with the node; its models stay the same objects from run to run, as on the page."""

    def __init__(self, server, student, base, prompt, batch=2):
        self.server, self.graph, self.calls = server, Graph(), server.file(".calls")
        model = load_student(self.graph, student)
        self.few_step = self.graph.add("TestCountCalls", model=model, seconds=0.0, path=self.calls)
        self.base = load_stock(self.graph, base)
        self.prompt = conditioning(server, self.graph, prompt)
        self.latent = empty_latent(server, self.graph, SD3_SHAPE, batch)
        widgets = {"seed": SEED, "count": 3, "steps": "1", "pick": 0, "method": "auto"}
        start = {"teacher_steps": 2, "landing": 1, "teacher_cfg": 1.0}
        sockets = {"few_step_model": self.few_step, "positive": self.prompt, "latent_image": self.latent}
        vae = self.graph.add("TestVAE", path="")
        self.node = self.graph.add("DPDMDSeeds", vae=vae, **widgets, **start, **sockets)

    def run(self, *outputs, **inputs):
        """Run with changed inputs; returns what the page gets, the number of network calls, and some outputs."""
        self.graph.nodes[self.node[0]]["inputs"] |= inputs
        Path(self.calls).write_text("")
        paths = [self.server.file(".safetensors") for _ in outputs]
        kept = dict(self.graph.nodes)
        for output, path in zip(outputs, paths, strict=True):
            kind = {2: ("TestSaveImage", "image")}.get(output, ("TestSaveLatent", "latent"))
            self.graph.add(kind[0], path=path, **{kind[1]: [self.node[0], output]})
        history = self.server.run(self.graph)
        self.graph.nodes = kept
        values = [next(iter(load_file(path).values())) if Path(path).is_file() else None for path in paths]
        return history["outputs"].get(self.node[0]), len(Path(self.calls).read_text().splitlines()), *values


def alone(seeds, **inputs):
    """The picture that DP-DMD Sampler draws."""
    graph = Graph()
    graph.nodes = dict(seeds.graph.nodes)
    latent = empty_latent(seeds.server, graph, SD3_SHAPE, 1)
    return seeds.server.latents(graph, sample(graph, seeds.few_step, seeds.prompt, latent, **inputs))


def test_drafts_are_shown_with_their_seeds_and_a_chosen_one_is_finished(server, student, sd3_file, sd3_prompt):
    seeds = Seeds(server, student, sd3_file, sd3_prompt)
    shown, calls, latent, drafts, sheet = seeds.run(0, 3, 2)
    assert [(tile["label"], tile["pick"]) for tile in shown["dpdmd_seeds"]] == [
        ("#1 seed 7", 1),
        ("#2 seed 8", 2),
        ("#3 seed 9", 3),
    ]
    assert all((server.base / "temp" / tile["filename"]).is_file() for tile in shown["dpdmd_seeds"])
    assert calls == 3 and latent is None  # one call for each seed; nothing behind the node runs
    assert sheet.shape[0] == 1 and sheet.shape[2] == 2 * 8 * SD3_SHAPE[2]
    assert torch.equal(drafts[2:], alone(seeds, seed=9, steps=1))

    _, calls, latent = seeds.run(0, pick=3)
    assert calls == 4  # the drafts of the last run are kept
    assert torch.equal(latent, alone(seeds, seed=9))


def test_the_seeds_are_drawn_again_if_an_input_changes(server, student, sd3_file, sd3_prompt):
    seeds = Seeds(server, student, sd3_file, sd3_prompt)
    assert seeds.run()[1] == 3
    assert seeds.run(seed=8)[1] == 3
    assert seeds.run(count=2)[1] == 2
    shown, calls = seeds.run(steps="1, 2")
    assert calls == 2 * (1 + 2) and shown["dpdmd_columns"] == [2]
    labels = ["#1 1 step, seed 8", "#2 1 step, seed 9", "#1 2 steps, seed 8", "#2 2 steps, seed 9"]
    assert [tile["label"] for tile in shown["dpdmd_seeds"]] == labels


def test_with_a_base_model_all_seeds_begin_with_a_teacher_start(server, student, sd3_file, sd3_prompt):
    seeds = Seeds(server, student, sd3_file, sd3_prompt)
    _, calls, latent = seeds.run(0, base_model=seeds.base, pick=2)
    assert calls == 3 * 1 + 3
    graph = seeds.graph
    start = {"teacher_steps": 2, "landing": 1, "teacher_cfg": 1.0, "method": "auto", "per_image_seed": True}
    models = {"base_model": seeds.base, "few_step_model": seeds.few_step, "positive": seeds.prompt}
    one = empty_latent(server, graph, SD3_SHAPE, 1)
    expected = server.latents(graph, graph.add("DPDMDTeacherStart", seed=8, latent_image=one, **start, **models))
    assert torch.equal(latent, expected)


@pytest.mark.parametrize(
    ("inputs", "facts"),
    [
        ({"pick": 4}, ("pick", "4", "1 to 3")),
        ({"steps": "one"}, ("'one'", "1, 2, 4")),
        ({"steps": "5"}, ("5", "4")),
        ({"steps": ""}, ("''",)),
        ({"count": 1}, ("count is 1", "compare")),
    ],
)
def test_bad_input_is_one_message_in_the_node(server, student, sd3_file, sd3_prompt, inputs, facts):
    seeds = Seeds(server, student, sd3_file, sd3_prompt)
    with refuses(RefusedError, *facts):
        seeds.run(**inputs)
    assert seeds.run(pick=0, steps="1", count=3)[1] == 3


def test_diversity_is_a_number_and_one_picture_has_none(server):
    graph, path = Graph(), server.file(".txt")
    noise = torch.randn(4, *SD3_SHAPE, generator=torch.Generator().manual_seed(0))
    node = graph.add("DPDMDDiversity", samples=graph.add("TestLatent", path=server.tensor_file(samples=noise)))
    graph.add("TestSaveNumber", number=node, path=path)
    server.run(graph)
    assert json.loads(Path(path).read_text()) == pytest.approx(2**0.5, abs=0.02)
    one = graph.add("TestLatent", path=server.tensor_file(samples=noise[:1]))
    graph.nodes[node[0]]["inputs"]["samples"] = one
    with refuses(RefusedError, "1 picture"):
        server.run(graph)
