"""Bad input inside a real ComfyUI: the node shows an error, and the server keeps working."""

import os

import pytest
import torch
from comfy_server import Graph, RefusedError
from safetensors.torch import save_file
from tests.raising import refuses
from workflows import (
    HEADER,
    OFFICIAL,
    SD3_MODULES,
    SD3_SHAPE,
    SDXL_HEADER,
    SDXL_SHAPE,
    TRAILING,
    conditioning,
    draw,
    empty_latent,
    load_stock,
    load_student,
    model_path,
    random_lora,
    require_comfyui,
    respell,
    sample,
    sample_with_parts,
    save_weights,
    scheduler,
    stock,
)

require_comfyui()


def assert_server_works(server, sd3_file, sd3_prompt):
    draw(server, stock(sd3_file), sd3_prompt, count=1, steps=1, schedule=OFFICIAL)


def load_alone(server, name, **inputs):
    """Run a workflow that only loads a student; inputs may depend on its graph."""
    graph = Graph()
    inputs = {key: value(graph) if callable(value) else value for key, value in inputs.items()}
    graph.add("TestSaveText", text=[load_student(graph, name, **inputs)[0], 1], path=server.file(".txt"))
    server.run(graph)


# ---- full students


CHANGES = {  # of a good file: tensors and header; None removes a tensor
    "newer_format": ({}, {"dpdmd.format": "2"}),
    "rising_levels": ({}, {"dpdmd.sigmas": "[1.0, 0.5, 0.75, 0.0]"}),
    "levels_above_zero": ({}, {"dpdmd.sigmas": "[1.0, 0.5, 0.25]"}),
    "wrong_family": ({}, {"dpdmd.family": "sdxl"}),
    "surplus_key": ({"extra.weight": torch.ones(2)}, {}),
    "missing_key": ({"proj_out.bias": None}, {}),
    "wrong_size": ({"context_embedder.weight": torch.ones(64, 32)}, {}),
}


def bad_file(server, network, kind):
    """Write a bad student; returns its name in Load DP-DMD Student."""
    state = network.state_dict()
    name = f"diffusion_models/{kind}.{'pt' if 'pickle' in kind else 'safetensors'}"
    path = model_path(server, name)
    if kind == "junk":
        path.write_bytes(b"this is no safetensors file at all")
    elif kind == "truncated":
        save_file(state, path, HEADER)
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "pickle_with_code":
        torch.save({"state_dict": state, "hook": os.system}, path)
    elif kind == "junk_pickle":
        path.write_bytes(b"no torch file at all")
    elif kind == "unknown_network":
        save_file({"a.weight": torch.ones(2), "b": torch.ones(2)}, path, HEADER)
    else:
        tensors, header = CHANGES[kind]
        state = {key: value for key, value in (state | tensors).items() if value is not None}
        save_file(state, path, HEADER | header)
    return name


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("junk", r"junk.safetensors"),
        ("truncated", r"truncated.safetensors"),
        ("pickle_with_code", r"pickle_with_code.pt.*not run"),
        ("junk_pickle", r"junk_pickle.pt"),
        ("newer_format", r"dpdmd.format.*'2'.*'1'"),
        ("rising_levels", r"dpdmd.sigmas.*\[1.0, 0.5, 0.75, 0.0\]"),
        ("levels_above_zero", r"dpdmd.sigmas.*\[1.0, 0.5, 0.25\]"),
        ("wrong_family", r"header.*sdxl.*weights.*sd3"),
        ("surplus_key", r"1 keys.*\(extra.weight\)"),
        ("missing_key", r"1 of \d+ keys \(proj_out.bias\)"),
        ("wrong_size", r"wrong_size.safetensors"),
        ("unknown_network", r"keys a.weight, b"),
    ],
)
def test_a_bad_student_is_refused_in_the_node(server, tiny_sd3, sd3_file, sd3_prompt, kind, message):
    with pytest.raises(RefusedError, match=message):
        load_alone(server, bad_file(server, tiny_sd3, kind))
    assert_server_works(server, sd3_file, sd3_prompt)


@pytest.mark.parametrize("name", ["diffusion_models/../../../secret.safetensors", "/etc/passwd", "loras/none.pt"])
def test_a_name_outside_the_list_is_refused(server, name):
    with refuses(RefusedError, "student_name"):
        load_alone(server, name)


# ---- LoRA students


OTHER_LAYER = {f"transformer.other.layer.lora_{factor}.weight": torch.ones(4, 4) for factor in "AB"}


def bad_lora(network, kind):
    """Tensors and header of a bad LoRA; no header has an alpha."""
    state, header = respell(random_lora(network, SD3_MODULES[:1]), "transformer."), HEADER
    match kind:
        case "another family":
            header = SDXL_HEADER
        case "no match":
            state = OTHER_LAYER
        case "unknown module":
            state |= OTHER_LAYER
        case "one factor":
            state["transformer.proj_out.lora_A.weight"] = torch.ones(4, 4)
        case "no key of a LoRA":
            state["text_encoder.weight"] = torch.ones(4)
        case "another size":
            state["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] = torch.ones(4, 3)
    return state, header | {"dpdmd.kind": "lora"}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another family", r"LoRA.*sdxl.*base_model is sd3"),
        ("no match", r"none of its 1 modules.*\(transformer.other.layer\)"),
        ("unknown module", r"lacks 1 modules \(transformer.other.layer\)"),
        ("one factor", r"one factor of 1 modules \(transformer.proj_out\)"),
        ("no key of a LoRA", r"1 keys.*\(text_encoder.weight\)"),
        ("another size", r"\[128, 3\].*\[128, 128\]"),
        ("no alpha", r"1 modules.*dpdmd.lora_alpha"),
        ("no base", r"LoRA.*base_model"),
        ("fp8", r"weight_dtype.*fp8_e4m3fn.*LoRA"),
    ],
)
def test_a_bad_lora_is_refused_in_the_node(server, tiny_sd3, sd3_file, kind, message):
    name = save_weights(server, "loras/bad.safetensors", *bad_lora(tiny_sd3, kind))
    inputs = {} if kind == "no base" else {"base_model": stock(sd3_file)}
    if kind == "fp8":
        inputs["weight_dtype"] = "fp8_e4m3fn"
    with pytest.raises(RefusedError, match=message):
        load_alone(server, name, **inputs)


def test_a_lora_without_a_header_does_not_inherit_the_levels_of_its_base_model(
    server, sd3_student, tiny_sd3, sd3_prompt
):
    state = respell(random_lora(tiny_sd3, SD3_MODULES[:1]), "transformer.")
    name = save_weights(server, "loras/no_header.safetensors", state)

    def load(graph):
        return load_student(graph, name, base_model=load_student(graph, sd3_student))

    with refuses(RefusedError, "schedule", OFFICIAL):
        draw(server, load, sd3_prompt)


# ---- sampling


@pytest.mark.parametrize(("family", "schedule"), [("sd3", OFFICIAL), ("sdxl", TRAILING)])
@pytest.mark.parametrize("load", [load_stock, load_student])
def test_a_model_without_a_header_is_refused_until_a_schedule_is_chosen(server, request, family, schedule, load):
    file, prompt = request.getfixturevalue(f"{family}_file"), request.getfixturevalue(f"{family}_prompt")
    shape = SD3_SHAPE if family == "sd3" else SDXL_SHAPE
    facts = ("schedule", schedule, "Load DP-DMD Student")
    with refuses(RefusedError, *facts):
        draw(server, lambda graph: load(graph, file), prompt, shape=shape)
    graph = Graph()
    graph.add("TestSaveSigmas", sigmas=scheduler(graph, load(graph, file)), path=server.file(".safetensors"))
    with refuses(RefusedError, *facts):
        server.run(graph)
    draw(server, lambda graph: load(graph, file), prompt, shape=shape, count=1, steps=1, schedule=schedule)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"denoise": 0.1}, r"denoise 0.1 .* 4 steps.* 0.125 "),
        ({"denoise": 0.0}, r"denoise 0 .* 4 steps"),
        ({"steps": 5}, r"steps is 5.* 4"),
        ({"steps": 17}, r"bigger than max.*steps"),
        ({"steps": -1}, r"smaller than min.*steps"),
        ({"sigmas": "1, 0.5, 0.7, 0"}, r"sigmas \[1, 0.5, 0.7, 0\] must fall"),
        ({"sigmas": "1, 0.5"}, r"sigmas \[1, 0.5\] end at 0.5"),
        ({"sigmas": "2, 1, 0"}, r"sigmas \[2, 1, 0\] start above 1"),
        ({"sigmas": "0"}, r"sigmas \[0\] .*step"),
        ({"shape": (4, 16, 16)}, r"latent_image has shape \[1, 4, 16, 16\].* 16,"),
        ({"shape": (16, 2, 16, 16)}, r"latent_image has shape \[1, 16, 2, 16, 16\]"),
    ],
)
def test_bad_values_are_refused_in_the_sampler(server, sd3_student, sd3_file, sd3_prompt, inputs, message):
    graph = Graph()
    model, inputs = load_student(graph, sd3_student), dict(inputs)
    samples = torch.ones(1, *inputs.pop("shape", SD3_SHAPE))
    latent = graph.add("TestLatent", path=server.tensor_file(samples=samples))
    if "sigmas" in inputs:
        inputs["sigmas"] = graph.add("ManualSigmasForTests", text=inputs["sigmas"], path="")
    latent = sample(graph, model, conditioning(server, graph, sd3_prompt), latent, **inputs)
    with pytest.raises(RefusedError, match=message):
        server.latents(graph, latent)
    assert_server_works(server, sd3_file, sd3_prompt)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"schedule": "SDXL trailing"}, r"'SDXL trailing'.*flow.*SD3.5"),
        ({"schedule": "custom", "custom": "1, x, 0"}, r"custom.*'1, x, 0'"),
        ({"schedule": "custom", "custom": ""}, r"custom.*''"),
        ({"denoise": 0.05}, r"denoise 0.05 .* 4 steps"),
    ],
)
def test_bad_values_are_refused_in_the_scheduler(server, sd3_student, inputs, message):
    graph = Graph()
    sigmas = scheduler(graph, load_student(graph, sd3_student), **inputs)
    graph.add("TestSaveSigmas", sigmas=sigmas, path=server.file(".safetensors"))
    with pytest.raises(RefusedError, match=message):
        server.run(graph)


@pytest.mark.parametrize(
    ("teacher", "steps", "facts"),
    [("sdxl", 1, ("sd3 flow SD3", "sdxl eps SDXL")), ("sd3", 2, ("teacher_steps", "2 of 2", "at least one"))],
)
def test_a_teacher_that_cannot_take_the_first_step_is_refused(
    server, sd3_file, sdxl_file, sd3_prompt, teacher, steps, facts
):
    graph = Graph()
    prompt, files = conditioning(server, graph, sd3_prompt), {"sd3": sd3_file, "sdxl": sdxl_file}
    models = {"student": load_stock(graph, sd3_file), "teacher": load_stock(graph, files[teacher])}
    conds = {"positive": prompt, "negative": prompt}
    guider = graph.add("DPDMDFirstStepGuider", **models, **conds, teacher_steps=steps, teacher_cfg=3.5)
    sigmas = graph.add("ManualSigmasForTests", text="1, 0.5, 0", path="")
    latent = sample_with_parts(graph, empty_latent(server, graph, SD3_SHAPE), guider=guider, sigmas=sigmas)
    with refuses(RefusedError, *facts):
        server.latents(graph, latent)
    assert_server_works(server, sd3_file, sd3_prompt)


def test_a_model_sampling_that_no_student_has_is_refused(server, sdxl_file, sdxl_prompt):
    def lcm(graph):
        return graph.add("ModelSamplingDiscrete", model=load_stock(graph, sdxl_file), sampling="lcm", zsnr=False)

    with refuses(RefusedError, "LCM", "model-sampling node"):
        draw(server, lcm, sdxl_prompt, shape=SDXL_SHAPE)
