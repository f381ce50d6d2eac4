"""Examples for models that this project does not train, run with small networks of ComfyUI's own classes."""

from functools import partial

import pytest
import torch
from browser_walk import read_example
from comfy_server import Graph
from test_surface import interface
from workflows import comfyui_version, load_stock, require_comfyui

require_comfyui()

FAMILIES = {
    "seeds_at_a_glance": "ZImage",
    "teacher_start_flux": "Flux",
    "teacher_start_qwen_lightning": "QwenImage",
    "teacher_start_sdxl_dmd2": "SDXL",
    "teacher_start_z_image": "ZImage",
}


def run_example(server, name, small, **changes):
    """Run an example with small models in place of its files; returns its saved pictures.

    Args:
        small: gives a node of the graph its small model, or another node of the same outputs.
        changes: inputs by their name, in every node that has them.
    """
    infos, flow, graph = server.get("object_info"), read_example(name), Graph()
    sources = {number: (source, slot) for number, source, slot, *_ in flow["links"]}
    names = {node["id"]: str(node["id"]) for node in flow["nodes"]}
    for node in flow["nodes"]:
        kind = node["type"]
        if kind == "MarkdownNote":
            continue
        inputs = {
            entry["name"]: [names[sources[entry["link"]][0]], sources[entry["link"]][1]]
            for entry in node["inputs"]
            if entry["link"] is not None
        }
        widgets = interface(infos[kind])[1]
        inputs |= {
            key: value
            for key, value in zip(widgets, node["widgets_values"], strict=True)
            if key in _inputs(infos[kind])
        }
        inputs |= {key: value for key, value in changes.items() if key in inputs}
        graph.nodes[names[node["id"]]] = {"class_type": kind, "inputs": inputs}
    graph.nodes["vae"] = {"class_type": "TestVAE", "inputs": {"path": ""}}
    for number, node in list(graph.nodes.items()):
        graph.nodes[number] = small(node, number)
    history = server.run(graph)
    return [image for output in history["outputs"].values() for image in output.get("images", [])]


def _inputs(info):
    return info["input"].get("required", {}) | info["input"].get("optional", {})


def with_small_models(node, number, *, family, prompt_file, sdxl_file=None):
    """A node that does the same for small models."""
    kind, inputs = node["class_type"], node["inputs"]
    if kind == "CheckpointLoaderSimple":
        graph = Graph()
        load_stock(graph, sdxl_file)
        return graph.nodes["1"]
    if kind == "UNETLoader":
        return {"class_type": "TestTinyModel", "inputs": {"family": family, "seed": int(number), "path": ""}}
    if kind == "LoraLoaderModelOnly":
        return {"class_type": "TestPatch", "inputs": {"model": inputs["model"], "path": ""}}
    if kind == "CLIPTextEncode":
        return {"class_type": "TestConditioning", "inputs": {"path": prompt_file}}
    if kind == "VAELoader" or "CLIPLoader" in kind:
        return {"class_type": "TestVAE", "inputs": {"path": ""}}
    if kind == "VAEDecode":
        node["inputs"]["vae"] = ["vae", 0]
    if kind.startswith("Empty"):
        node["inputs"] |= {"width": 128, "height": 128}
    return node


@pytest.mark.parametrize("name", FAMILIES)
def test_an_example_runs_with_small_networks_of_its_family(server, name, sd3_prompt, sdxl_prompt, sdxl_file):
    if FAMILIES[name] == "ZImage" and comfyui_version() == "0.3.64":
        pytest.skip("this ComfyUI has no Z-Image")
    prompt = sdxl_prompt if FAMILIES[name] == "SDXL" else sd3_prompt
    if FAMILIES[name] == "ZImage":
        prompt = prompt | {"attention_mask": torch.ones(1, 20, dtype=torch.int)}
    files = {"prompt_file": server.tensor_file(**prompt), "sdxl_file": sdxl_file}
    pictures = run_example(server, name, partial(with_small_models, family=FAMILIES[name], **files), pick=3)
    assert len(pictures) == (1 if name == "seeds_at_a_glance" else 4)
