"""Warm starts: our students, and LoRAs of other programs as diffusers itself fuses them."""

from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.lora import kohya_from_peft
from dpdmd_pipeline.backbones.start import load_start
from dpdmd_pipeline.backbones.student_file import save_lora, save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader

TARGETS = {"sd3": ["to_q", "to_out.0", "add_k_proj"], "sdxl": ["to_q", "to_out.0", "conv1", "proj_in"]}
HEADERS = {
    "sd3": StudentHeader("sd3", [1.0, 0.5, 0.0], shift=1.0),
    "sdxl": StudentHeader("sdxl", prediction="eps", timesteps=[999, 499]),
}


@pytest.fixture
def family(request, tiny_teacher, tiny_sdxl):
    """A family, its backbone, diffusers' pipeline class, and the network's name there; its name is the parameter."""
    name = request.param
    folder = {"sd3": tiny_teacher, "sdxl": tiny_sdxl}[name]
    options = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98)}
    kind, part = {
        "sd3": (diffusers.StableDiffusion3Pipeline, "transformer"),
        "sdxl": (diffusers.StableDiffusionXLPipeline, "unet"),
    }[name]
    return SimpleNamespace(name=name, backbone=load_backbone(name, folder, **options), pipeline=kind, part=part)


def adapter_of(family, rank=4, alpha=8):
    """A random LoRA with peft's keys, and its config."""
    network = family.backbone.load_model()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LoraConfig(r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=TARGETS[family.name])
        network.add_adapter(config, "a")
    return get_peft_model_state_dict(network, adapter_name="a")


def save_foreign(family, folder, layout, **parts):
    """Write the LoRA as another program does; returns its file."""
    state, file = adapter_of(family), folder / "pytorch_lora_weights.safetensors"
    if layout == "kohya":
        save_file({name: value.contiguous() for name, value in kohya_from_peft(state, 2.0).items()}, file)
    else:
        config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family.name]}
        facts = {f"{family.part}_lora_adapter_metadata": config} if layout == "diffusers" else {}
        family.pipeline.save_lora_weights(folder, **{f"{family.part}_lora_layers": state}, **facts, **parts)
    return file


def fused_by_diffusers(family, file):
    absent = {"text_encoder_3": None, "tokenizer_3": None} if family.name == "sd3" else {}
    pipeline = family.pipeline.from_pretrained(family.backbone.folder, **absent)
    pipeline.load_lora_weights(str(file))
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    return getattr(pipeline, family.part).state_dict()


def started(family, path):
    network = family.backbone.load_model()
    load_start(path, family.backbone, family.name).load_into(network)
    return network.state_dict()


@pytest.mark.parametrize(
    ("family", "layout"), [("sd3", "diffusers"), ("sdxl", "without alpha"), ("sdxl", "kohya")], indirect=["family"]
)
def test_a_lora_of_another_program_changes_the_network_as_in_diffusers(family, tmp_path, layout):
    file = save_foreign(family, tmp_path, layout)
    expected, ours = fused_by_diffusers(family, file), started(family, file)
    assert expected.keys() == ours.keys()
    for name, value in family.backbone.load_model().state_dict().items():
        torch.testing.assert_close(ours[name], expected[name], rtol=0, atol=1e-6)
        changes = name.removesuffix(".weight").endswith(tuple(TARGETS[family.name]))
        assert changes != torch.equal(ours[name], value), name


@pytest.mark.parametrize(("family", "kind"), [("sdxl", "full"), ("sd3", "lora")], indirect=["family"])
def test_a_student_of_ours_is_a_start_by_its_folder(family, tmp_path, kind):
    header, network = HEADERS[family.name], family.backbone.load_model()
    if kind == "full":
        with torch.no_grad():
            next(network.parameters()).add_(1)
        save_student(tmp_path, network, header)
    else:
        state = adapter_of(family)
        (tmp_path / "foreign").mkdir()
        save_lora(tmp_path, state, replace(header, kind="lora", lora_rank=4, lora_alpha=8.0))
        network.load_state_dict(fused_by_diffusers(family, save_foreign(family, tmp_path / "foreign", "diffusers")))
    for name, value in started(family, tmp_path).items():
        torch.testing.assert_close(value, network.state_dict()[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
def test_what_is_no_start_for_the_network_is_refused_by_its_file(family, tmp_path, tiny_teacher, tiny_sdxl):
    other = {"sd3": tiny_sdxl / "unet", "sdxl": tiny_teacher / "transformer"}[family.name]
    with refuses(ValueError, str(other), "does not fit"):
        load_start(other, family.backbone, family.name)
    with refuses(FileNotFoundError, "start_from", str(tmp_path / "nothing")):
        load_start(tmp_path / "nothing", family.backbone, family.name)
    save_student(tmp_path, family.backbone.load_model(), HEADERS[{"sd3": "sdxl", "sdxl": "sd3"}[family.name]])
    with refuses(ValueError, str(tmp_path), "family"):
        load_start(tmp_path, family.backbone, family.name)


@pytest.mark.parametrize("family", ["sd3"], indirect=True)
@pytest.mark.parametrize("fault", ["of another network", "unknown key", "text encoder", "not finite"])
def test_a_lora_that_cannot_be_applied_whole_is_refused_by_its_file(family, tmp_path, fault):
    state = adapter_of(family)
    keys = {f"{family.part}.{name}": value for name, value in state.items()}
    first = next(iter(keys))
    if fault == "of another network":
        keys = {name.replace("to_q", "to_z"): value for name, value in keys.items()}
    elif fault == "unknown key":
        keys[f"{family.part}.nowhere.lora_A.weight"] = keys[first].clone()
    elif fault == "text encoder":
        keys["text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)
    else:
        keys[first] = torch.full_like(keys[first], torch.inf)
    file = tmp_path / "lora.safetensors"
    save_file({name: value.contiguous() for name, value in keys.items()}, file)
    with refuses(ValueError, str(file), *(["fuse"] if fault == "text encoder" else [])):
        load_start(file, family.backbone, family.name)
