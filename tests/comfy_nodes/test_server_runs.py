"""The pack inside a real ComfyUI: its nodes, its import, the teacher's first step, calls, progress, interruption."""

import asyncio
import json
import struct
from pathlib import Path

import pytest
import torch
from comfy_server import REPOSITORY, Graph
from test_surface import NODES
from workflows import (
    HEADER,
    OFFICIAL,
    SD3_MODULES,
    SD3_SHAPE,
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
    sample,
    sample_with_parts,
    save_weights,
    scheduler,
    sd3_denoiser,
    sd3_units,
    stock,
)

from dpdmd_pipeline.dpdmd.noise import flow_schedule
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

require_comfyui()


# ---- the pack


@pytest.mark.parametrize("version", [comfyui_version()])
def test_every_node_has_a_description_and_tooltips(server, version):
    assert server.get("system_stats")["system"]["comfyui_version"] == version
    nodes = {name: node for name, node in server.get("object_info").items() if node["category"] == "DP-DMD"}
    assert set(nodes) == set(NODES)
    for node in nodes.values():
        assert node["python_module"] == "custom_nodes.dpdmd" and node["description"]
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert all(options["tooltip"] for _kind, options in inputs.values()) and all(node["output_tooltips"])


def test_importing_the_pack_takes_a_fifth_of_a_second_and_loads_nothing_of_the_pipeline(server):
    graph, path = Graph(), server.file(".json")
    graph.add("TestPack", path=path)
    server.run(graph)
    report = json.loads(Path(path).read_text())
    assert report["seconds"] <= 0.2, "CPU seconds, so that a busy machine does not matter"
    assert set(report["foreign"]) <= {"accelerate"}  # transformers loads it by itself if it is installed


def test_a_clone_of_the_whole_repository_is_a_pack_too(start_server):
    with start_server(REPOSITORY) as server:
        nodes = [node for node in server.get("object_info").values() if node["category"] == "DP-DMD"]
        assert len(nodes) == len(NODES) and all(node["python_module"] == "custom_nodes.dpdmd" for node in nodes)


# ---- the teacher's first step


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_guided_teacher_takes_the_first_step_and_the_student_the_rest(server, sd3_file, tiny_sd3, sd3_prompt, kind):
    lora = random_lora(tiny_sd3, SD3_MODULES)
    network = merge_lora(tiny_sd3, lora, 1.0)
    graph, calls = Graph(), server.file(".calls")
    teacher = load_stock(graph, sd3_file)
    if kind == "full":
        name = save_weights(server, "diffusion_models/first_step.safetensors", network.state_dict(), HEADER)
        student = load_student(graph, name)
    else:
        header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
        name = save_weights(server, "loras/first_step.safetensors", respell(lora, "transformer."), header)
        student = load_student(graph, name, base_model=teacher)
    negative = {key: value.flip(-1) for key, value in sd3_prompt.items()}
    guider = graph.add(
        "DPDMDFirstStepGuider",
        student=graph.add("TestCountCalls", model=student, seconds=0.0, path=calls),
        teacher=teacher,
        positive=conditioning(server, graph, sd3_prompt),
        negative=conditioning(server, graph, negative),
        teacher_steps=1,
        teacher_cfg=3.5,
    )
    latent = empty_latent(server, graph, SD3_SHAPE)
    latent = sample_with_parts(graph, latent, guider=guider, sigmas=scheduler(graph, student))

    def teacher_then_student(latents, level):
        if level.sigma < 1:
            return sd3_denoiser(network, sd3_prompt)(latents, level)
        cond, uncond = (sd3_denoiser(tiny_sd3, prompt)(latents, level) for prompt in (sd3_prompt, negative))
        return uncond + 3.5 * (cond - uncond)

    with torch.no_grad():
        expected = rollout(teacher_then_student, noise_from_seeds(SEEDS, SD3_SHAPE), flow_schedule(TRAINED))
    for _again in range(2):
        assert_close(sd3_units(server.latents(graph, latent)), expected, 1e-4)
    assert len(Path(calls).read_text().split("\n")) - 1 == 3  # the student is called only in its own steps


# ---- cost, progress, interruption


@pytest.mark.parametrize("per_image_seed", [True, False])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_picture_takes_exactly_one_network_call_per_step(server, sd3_file, sd3_prompt, steps, per_image_seed):
    calls = server.file(".calls")

    def counted(graph):
        return graph.add("TestCountCalls", model=load_stock(graph, sd3_file), seconds=0.0, path=calls)

    draw(server, counted, sd3_prompt, steps=steps, per_image_seed=per_image_seed, schedule=OFFICIAL)
    levels = {1: ["1"], 4: ["1", "0.857692", "0.602151", "0.00892857"]}[steps]
    pictures = ["1"] * 3 if per_image_seed else ["3"]  # on a CPU pictures with their own seeds run one by one
    expected = [f"{level} {count}" for level in levels for count in pictures]
    assert Path(calls).read_text().split("\n")[:-1] == expected


def watch(server, graph, on_progress=lambda value: None):
    """Run a workflow and collect the messages to the page: steps, previews, texts, the last event."""
    import aiohttp

    async def listen():
        messages = {"progress": [], "previews": 0, "texts": []}
        address = f"http://127.0.0.1:{server.port}/ws?clientId=watcher"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt = server.queue(graph, "watcher")
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    kind = struct.unpack(">I", message.data[:4])[0]
                    if kind == 3:
                        length = struct.unpack(">I", message.data[4:8])[0]
                        messages["texts"].append(message.data[8 + length :].decode())
                    messages["previews"] += kind == 1
                    continue
                event = json.loads(message.data)
                if event["type"] == "progress":
                    messages["progress"].append((event["data"]["value"], event["data"]["max"]))
                    on_progress(event["data"]["value"])
                if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return messages | {"end": event["type"], "prompt": prompt}

    return asyncio.run(asyncio.wait_for(listen(), timeout=300))


def test_every_step_shows_progress_and_a_preview_and_the_node_shows_its_schedule(server, sd3_student, sd3_prompt):
    graph = Graph()
    latent, prompt = empty_latent(server, graph, SD3_SHAPE), conditioning(server, graph, sd3_prompt)
    latent = sample(graph, load_student(graph, sd3_student), prompt, latent, seed=4321)
    graph.add("TestSaveLatent", latent=latent, path=server.file(".safetensors"))
    messages = watch(server, graph)
    assert messages["end"] == "execution_success" and messages["previews"] == 4
    assert messages["progress"] == [(step, 4) for step in (1, 2, 3, 4)]
    (schedule,) = [text for text in messages["texts"] if "1, 0.9, 0.6, 0.3, 0" in text and "levels" not in text]
    assert "4 steps" in schedule and "deterministic" in schedule and "the student's file" in schedule


def test_an_interrupted_run_stops_between_its_steps(server, sd3_file, sd3_prompt):
    graph, calls = Graph(), server.file(".calls")
    model = graph.add("TestCountCalls", model=load_stock(graph, sd3_file), seconds=0.3, path=calls)
    latent = empty_latent(server, graph, SD3_SHAPE, 1)
    sigmas = scheduler(graph, model, steps=16, schedule=OFFICIAL)
    latent = sample(graph, model, conditioning(server, graph, sd3_prompt), latent, sigmas=sigmas)
    graph.add("TestSaveLatent", latent=latent, path=server.file(".safetensors"))
    messages = watch(server, graph, lambda value: server.post("interrupt", {}) if value == 1 else None)
    assert messages["end"] == "execution_interrupted" and len(Path(calls).read_text().split()) < 2 * 8
    draw(server, stock(sd3_file), sd3_prompt, count=1, steps=1, schedule=OFFICIAL)  # the server still works
