"""Quantised weights inside a real ComfyUI: full students, and LoRA students on quantised base models.

GGUF is tested with the real ComfyUI-GGUF, if COMFYUI_GGUF is a checkout of it and ComfyUI's Python has `gguf`.
"""

import json
import os

import pytest
from comfy_server import Graph, RefusedError
from safetensors import safe_open
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    HEADER,
    SD3_MODULES,
    SD3_SHAPE,
    TRAINED,
    assert_close,
    conditioning,
    draw,
    empty_latent,
    load_stock,
    load_student,
    merge_lora,
    model_path,
    our_latents,
    random_lora,
    require_comfyui,
    respell,
    sample,
    save_weights,
    scheduler,
    sd3_units,
    student,
)

require_comfyui()

needs_formats = pytest.mark.skipif(
    not (os.environ.get("COMFYUI_PATH") and os.path.exists(f"{os.environ['COMFYUI_PATH']}/comfy/quant_ops.py")),
    reason="this version of ComfyUI has no quantised formats",
)
needs_gguf = pytest.mark.skipif(not os.environ.get("COMFYUI_GGUF"), reason="COMFYUI_GGUF is not set")

# format -> largest difference of the latents (up to 5) from those of float32 weights; they differ by half of it
FORMATS = [
    ("scaled_fp8", 0.13),
    pytest.param("float8_e4m3fn", 0.04, marks=needs_formats),
    pytest.param("int8_tensorwise", 0.02, marks=needs_formats),
    pytest.param("nvfp4", 0.15, marks=needs_formats),
]


def quantised(server, sd3_file, form):
    """Quantise the tiny SD3; returns the file's name in models/diffusion_models."""
    name = f"sd3_{form}.{'gguf' if form == 'gguf' else 'safetensors'}"
    path = model_path(server, f"diffusion_models/{name}")
    if not path.exists():
        graph = Graph()
        graph.add("TestSaveQuantised", model=load_stock(graph, sd3_file), form=form, path=str(path))
        server.run(graph)
    return name


@pytest.mark.parametrize(
    ("form", "tolerance"),
    [
        ("scaled_fp8", 0.4),  # 0.3.64 keeps the base model's scale and clips
        *FORMATS[1:],
        pytest.param("gguf", 0.02, marks=needs_gguf),
    ],
)
def test_a_lora_student_works_on_a_quantised_base_model(server, sd3_file, tiny_sd3, sd3_prompt, form, tolerance):
    lora = random_lora(tiny_sd3, SD3_MODULES)
    header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
    name = save_weights(server, "loras/quantised.safetensors", respell(lora, "transformer."), header)
    graph = Graph()
    loader = "UnetLoaderGGUF" if form == "gguf" else "UNETLoader"
    inputs = {} if form == "gguf" else {"weight_dtype": "default"}
    base = graph.add(loader, unet_name=quantised(server, sd3_file, form), **inputs)
    mine = load_student(graph, name, base_model=base)
    theirs = graph.add("LoraLoaderModelOnly", model=base, lora_name="quantised.safetensors", strength_model=1.0)
    path, results = server.file(".safetensors"), []
    sigmas = scheduler(graph, mine)
    for model in (mine, theirs):
        prompt, latent = conditioning(server, graph, sd3_prompt), empty_latent(server, graph, SD3_SHAPE)
        results.append(sample(graph, model, prompt, latent, sigmas=sigmas, method="deterministic"))
    graph.add("TestSaveLatent", latent=results[1], path=path)
    latents = server.latents(graph, results[0])
    assert_close(latents, load_file(path)["samples"], 1e-6)  # ComfyUI's own Load LoRA
    assert_close(sd3_units(latents), our_latents(merge_lora(tiny_sd3, lora, 1.0), sd3_prompt, TRAINED), tolerance)


@pytest.mark.parametrize(("form", "tolerance"), FORMATS)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_quantised_full_student_loads_with_its_metadata(
    server, sd3_file, tiny_sd3, sd3_prompt, form, tolerance, prefix
):
    path = model_path(server, f"diffusion_models/{quantised(server, sd3_file, form)}")
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata() or {})
    if "_quantization_metadata" in metadata:
        layers = json.loads(metadata["_quantization_metadata"])["layers"]
        layers = {prefix + name: options for name, options in layers.items()}
        metadata["_quantization_metadata"] = json.dumps({"layers": layers})
    state = {prefix + key: value for key, value in load_file(path).items()}
    name = save_weights(server, "diffusion_models/quantised_student.safetensors", state, metadata | HEADER)
    latents = sd3_units(draw(server, student(name), sd3_prompt))
    assert_close(latents, our_latents(tiny_sd3, sd3_prompt, TRAINED), tolerance)


@needs_formats
@pytest.mark.parametrize(
    "metadata",
    ["{", "[1]", "{}", '{"layers": {"joint_blocks.0.x_block.attn.qkv": {"format": "none"}}}', "[" * 10**5],
    ids=["torn", "list", "empty", "unknown format", "deep"],
)
def test_quantisation_that_comfyui_does_not_know_is_refused_in_one_line(server, sd3_file, tiny_sd3, metadata):
    state = load_file(model_path(server, f"diffusion_models/{quantised(server, sd3_file, 'float8_e4m3fn')}"))
    header = HEADER | {"_quantization_metadata": metadata}
    name = save_weights(server, "diffusion_models/unknown_format.safetensors", state, header)
    graph = Graph()
    graph.add("TestSaveText", text=[load_student(graph, name)[0], 1], path=server.file(".txt"))
    with refuses(RefusedError, "unknown_format.safetensors") as error:
        server.run(graph)
    assert "\n" not in str(error.value)
