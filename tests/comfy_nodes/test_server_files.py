"""Student files inside a real ComfyUI: full weights in every spelling, LoRAs, replaced files, fp8."""

import os
from pathlib import Path

import pytest
import torch
from comfy_server import REPOSITORY, Graph, RefusedError
from safetensors.torch import load_file
from tests.raising import refuses
from workflows import (
    HEADER,
    OFFICIAL,
    PUBLISHED,
    SD3_MODULES,
    SD3_SHAPE,
    SDXL_HEADER,
    SDXL_SCALE,
    SDXL_SHAPE,
    SEEDS,
    TRAILING,
    TRAINED,
    assert_close,
    comfyui_version,
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
    stock,
    student,
    x0_sampling,
)

from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout

require_comfyui()

SDXL_MODULES = [
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "up_blocks.0.attentions.1.proj_in",
    "up_blocks.1.resnets.0.conv1",
]


def info_of(server, graph, model):
    """Run a graph; the info text of its Load DP-DMD Student."""
    path = server.file(".txt")
    graph.add("TestSaveText", text=[model[0], 1], path=path)
    server.run(graph)
    return Path(path).read_text()


# ---- full students


@pytest.fixture(scope="module")
def embedded_student(server, tmp_path_factory):
    """The embedded teacher as the file that `train` saves; returns its backbone and levels."""
    from dpdmd_pipeline.backbones.base import load_backbone
    from dpdmd_pipeline.backbones.student_file import save_student
    from dpdmd_pipeline.backbones.student_header import StudentHeader

    teacher = REPOSITORY / "data" / "06_models" / "shapes_teacher"
    backbone = load_backbone("sd3", teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))
    folder = tmp_path_factory.mktemp("student")
    levels = backbone.student_schedule([1.0, 0.75, 0.5, 0.25], 4)
    header = StudentHeader(family="sd3", sigmas=levels.sigma.tolist())
    save_student(folder, backbone.load_model(), header)
    target = model_path(server, "diffusion_models/embedded.safetensors")
    target.write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    return backbone, levels


@pytest.mark.parametrize("loader", ["Load DP-DMD Student", "Load Diffusion Model"])
def test_a_student_of_the_embedded_world_gives_our_samplers_latents(server, embedded_student, loader):
    from dpdmd_pipeline.backbones.base import conditioned

    backbone, levels = embedded_student
    cond = backbone.encode(["a red circle"])
    graph, name = Graph(), "diffusion_models/embedded.safetensors"
    model = load_student(graph, name) if loader == "Load DP-DMD Student" else load_stock(graph, name)
    inputs = {}
    if loader == "Load Diffusion Model":  # it drops the header
        inputs["sigmas"] = scheduler(graph, model, schedule="custom", custom="1 0.75 0.5 0.25 0")
    latent = empty_latent(server, graph, backbone.latent_shape)
    latent = sample(graph, model, conditioning(server, graph, cond), latent, **inputs)
    with torch.no_grad():
        noise = noise_from_seeds(SEEDS, backbone.latent_shape)
        repeated = {key: value.expand(3, *value.shape[1:]) for key, value in cond.items()}
        expected = rollout(conditioned(backbone, backbone.load_model(), repeated), noise, levels)
    assert_close(sd3_units(server.latents(graph, latent)), expected, 1e-4)


def test_a_released_state_dict_with_wrapped_keys_loads(server, tiny_sd3, sd3_prompt):
    name = "diffusion_models/released.pt"
    state = {f"module.transformer.{key}": value for key, value in tiny_sd3.state_dict().items()}
    torch.save({"state_dict": state}, model_path(server, name))
    latents = sd3_units(draw(server, student(name), sd3_prompt, schedule=OFFICIAL))
    assert_close(latents, our_latents(tiny_sd3, sd3_prompt, PUBLISHED), 1e-5)
    graph = Graph()
    info = info_of(server, graph, load_student(graph, name))
    assert (
        "sd3" in info
        and f"{len(state)} of {len(state)} keys" in info
        and "no DP-DMD header" in info
        and OFFICIAL in info
    )


def test_a_student_in_comfyuis_own_spelling_loads(server, sd3_file):
    name = "diffusion_models/own_spelling.safetensors"
    graph = Graph()
    graph.add("TestSaveNetwork", model=load_stock(graph, sd3_file), path=str(model_path(server, name)))
    server.run(graph)
    state = load_file(model_path(server, name))
    save_weights(server, name, state, HEADER)
    graph = Graph()
    info = info_of(server, graph, load_student(graph, name))
    assert f"{len(state)} of {len(state)} keys" in info and "flow, euler, 4 steps" in info


@pytest.mark.skipif(comfyui_version().startswith("0.3."), reason="this version knows FLUX in its own sizes only")
@pytest.mark.parametrize("spelling", ["diffusers", "ComfyUI"])
def test_a_student_of_another_flow_family_loads_and_is_sampled_on_its_levels(server, tiny_flux, sd3_prompt, spelling):
    name = save_weights(server, "diffusion_models/flux.safetensors", tiny_flux.state_dict())
    reference = draw(server, stock(name), sd3_prompt, sigmas=TRAINED, method="deterministic")
    if spelling == "ComfyUI":
        graph, path = Graph(), model_path(server, "diffusion_models/flux_own.safetensors")
        graph.add("TestSaveNetwork", model=load_stock(graph, name), path=str(path))
        server.run(graph)
        state = load_file(path)
    else:
        state = tiny_flux.state_dict()
    name = save_weights(server, "diffusion_models/flux.safetensors", state, HEADER | {"dpdmd.family": "flux"})
    assert_close(draw(server, student(name), sd3_prompt), reference, 1e-6)
    graph = Graph()
    assert f"{len(state)} of {len(state)} keys" in info_of(server, graph, load_student(graph, name))
    save_weights(server, name, dict(list(state.items())[:-1]), HEADER | {"dpdmd.family": "flux"})
    graph = Graph()
    with refuses(RefusedError, "lacks 1 of", name.split("/")[1]):
        info_of(server, graph, load_student(graph, name))


def test_a_replaced_file_is_loaded_again(server, tiny_sd3, sd3_prompt):
    def draw_state(state):
        name = save_weights(server, "diffusion_models/replaced.safetensors", state, HEADER)
        return draw(server, student(name), sd3_prompt, count=1)

    other = tiny_sd3.state_dict() | {"proj_out.bias": torch.ones_like(tiny_sd3.proj_out.bias)}
    assert not torch.equal(draw_state(tiny_sd3.state_dict()), draw_state(other))


def test_fp8_weights_are_close(server, sd3_student, tiny_sd3, sd3_prompt):
    latents = sd3_units(draw(server, student(sd3_student, weight_dtype="fp8_e4m3fn"), sd3_prompt))
    change = latents - our_latents(tiny_sd3, sd3_prompt, TRAINED)
    assert 0 < change.abs().max() < 0.5


LEAVES_PATH = "cached_patcher_init"  # attribute in which newer versions of ComfyUI leave a loader's arguments


def leaves_path():
    return LEAVES_PATH in (Path(os.environ["COMFYUI_PATH"]) / "comfy" / "sd.py").read_text()


def test_comfyuis_own_loader_keeps_the_schedule_where_it_leaves_the_path(server, sd3_student, tiny_sd3, sd3_prompt):
    if not leaves_path():
        with refuses(RefusedError, "DP-DMD header", "schedule", "Load DP-DMD Student"):
            draw(server, stock(sd3_student), sd3_prompt, steps=0)
        return
    latents = sd3_units(draw(server, stock(sd3_student), sd3_prompt, steps=0))
    assert_close(latents, our_latents(tiny_sd3, sd3_prompt, TRAINED), 1e-5)


def test_a_lora_without_a_header_on_a_student_of_comfyuis_own_loader_has_none(
    server, sd3_student, tiny_sd3, sd3_prompt
):
    state = respell(random_lora(tiny_sd3, SD3_MODULES[:1]), "transformer.")
    name = save_weights(server, "loras/style.safetensors", state)

    def load(graph):
        return load_student(graph, name, base_model=load_stock(graph, sd3_student))

    with refuses(RefusedError, "DP-DMD header", "schedule"):
        draw(server, load, sd3_prompt)


def test_a_student_that_predicts_v_is_not_sampled_as_eps(server, tiny_sdxl, sdxl_prompt):
    header = SDXL_HEADER | {"dpdmd.prediction": "v"}
    name = save_weights(server, "diffusion_models/sdxl_v_stock.safetensors", tiny_sdxl.state_dict(), header)
    facts = ["predicts v", "set to eps"] if leaves_path() else ["DP-DMD header"]
    with refuses(RefusedError, "Load DP-DMD Student", *facts):
        draw(server, stock(name), sdxl_prompt, shape=SDXL_SHAPE, steps=0)


@pytest.mark.parametrize("family", ["sd3", "sdxl"])
def test_the_info_of_a_run_without_a_header_begins_with_a_warning(server, request, family):
    file, prompt = request.getfixturevalue(f"{family}_file"), request.getfixturevalue(f"{family}_prompt")
    shape, schedule = (SD3_SHAPE, OFFICIAL) if family == "sd3" else (SDXL_SHAPE, TRAILING)
    graph, path = Graph(), server.file(".txt")
    model = load_stock(graph, file)
    latent = empty_latent(server, graph, shape, 1)
    sigmas = scheduler(graph, model, steps=1, schedule=schedule)
    latent = sample(graph, model, conditioning(server, graph, prompt), latent, sigmas=sigmas)
    graph.add("TestSaveText", text=[latent[0], 1], path=path)
    server.run(graph)
    warning, run = Path(path).read_text().split("\n")
    assert warning.startswith("Warning: no DP-DMD header") and ("read as eps" in warning) == (family == "sdxl")
    assert "1 steps" in run


# ---- how files are read


def test_a_student_is_read_by_comfyuis_own_reader(server, sd3_student, tiny_sd3):
    header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "4"}
    state = respell(random_lora(tiny_sd3, SD3_MODULES), "transformer.")
    name = save_weights(server, "loras/read.safetensors", state, header)
    graph, path = Graph(), server.file(".txt")
    graph.add("TestReadFiles", path=path, after=load_student(graph, name, base_model=load_student(graph, sd3_student)))
    server.run(graph)
    assert {"read.safetensors", Path(sd3_student).name} <= set(Path(path).read_text().split("\n"))


def test_files_with_a_header_come_first_in_the_list(server, sd3_student, sd3_file):
    save_weights(server, "loras/a_style.safetensors", {"a.lora_A.weight": torch.ones(1, 1)})
    files = server.get("object_info/DPDMDLoader")["DPDMDLoader"]["input"]["required"]["student_name"]
    files = files[1]["options"] if files[0] == "COMBO" else files[0]
    assert files.index(sd3_student) < files.index(sd3_file) and files.index(sd3_student) < files.index(
        "loras/a_style.safetensors"
    )


# ---- LoRA students


@pytest.mark.parametrize("spelling", ["transformer.", "base_model.model.", "peft with adapter name", ""])
def test_an_sd3_lora_equals_merged_weights_in_every_spelling_of_its_keys(
    server, sd3_file, tiny_sd3, sd3_prompt, spelling
):
    state = random_lora(tiny_sd3, SD3_MODULES)
    header = HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "8.0"}
    name = save_weights(server, "loras/sd3_lora.safetensors", respell(state, spelling), header)
    graph = Graph()
    model = load_student(graph, name, base_model=load_stock(graph, sd3_file), strength=0.5)
    latent = empty_latent(server, graph, SD3_SHAPE)
    latent = sample(graph, model, conditioning(server, graph, sd3_prompt), latent)
    expected = our_latents(merge_lora(tiny_sd3, state, 0.5 * 8 / 4), sd3_prompt, TRAINED)
    assert_close(sd3_units(server.latents(graph, latent)), expected, 1e-5)
    info = info_of(server, graph, model)
    assert "6 of 6 modules" in info and "flow, euler, 4 steps" in info and "1, 0.9, 0.6, 0.3, 0" in info


@pytest.mark.parametrize("spelling", ["kohya", "unet.", "base_model.model.", ""])
def test_an_sdxl_lora_equals_merged_weights_in_every_spelling_of_its_keys(
    server, sdxl_file, tiny_sdxl, sdxl_prompt, spelling
):
    state = random_lora(tiny_sdxl, SDXL_MODULES)
    alphas = {}
    if spelling == "kohya":
        alphas = {f"lora_unet_{module.replace('.', '_')}.alpha": torch.tensor(8.0) for module in SDXL_MODULES}
    header = SDXL_HEADER | {"dpdmd.kind": "lora", "dpdmd.lora_rank": "4", "dpdmd.lora_alpha": "8"}
    name = save_weights(server, "loras/sdxl_lora.safetensors", respell(state, spelling) | alphas, header)

    def load(graph):
        return load_student(graph, name, base_model=load_stock(graph, sdxl_file))

    latents = draw(server, load, sdxl_prompt, shape=SDXL_SHAPE) * SDXL_SCALE
    expected = x0_sampling(merge_lora(tiny_sdxl, state, 2.0), sdxl_prompt, SEEDS)
    assert_close(latents, expected, 1e-5 * expected.abs().max().item())
