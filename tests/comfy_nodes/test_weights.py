"""Reading of student files: what the package writes is understood, what does not fit is refused by name."""

import json
import os
from pathlib import Path

import pytest
import torch
from comfy_nodes.weights import StudentHeader
from safetensors.torch import save_file

from comfy_nodes import weights

FLOW = {
    "format": "pt",
    "dpdmd.format": "1",
    "dpdmd.family": "sd3",
    "dpdmd.kind": "full",
    "dpdmd.prediction": "flow",
    "dpdmd.sampler": "euler",
    "dpdmd.sigmas": "[1.0, 0.75, 0.5, 0.25, 0.0]",
    "dpdmd.shift": "3.0",
    "dpdmd.guidance": "1.0",
}
EPS = {
    "dpdmd.format": "1",
    "dpdmd.family": "sdxl",
    "dpdmd.kind": "lora",
    "dpdmd.prediction": "eps",
    "dpdmd.sampler": "renoise",
    "dpdmd.timesteps": "[999, 749, 499, 249]",
    "dpdmd.lora_rank": "64",
    "dpdmd.lora_alpha": "128.0",
}
STATE = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4)}


# ---- the contract with the trainer and the exporter


def test_the_header_that_the_package_writes_is_read_here(tmp_path):
    from diffusers import SD3Transformer2DModel

    from dpdmd_pipeline.backbones import student_file

    model = SD3Transformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=1, caption_projection_dim=64, joint_attention_dim=8
    )
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    student_file.save_student(tmp_path, model, student_file.StudentHeader(family="sd3", sigmas=sigmas))
    state, metadata = weights.load_state(str(tmp_path / student_file.WEIGHTS), "student")
    header = weights.read_header(metadata, "student")
    assert (header.family, header.kind, header.prediction, header.sampler) == ("sd3", "full", "flow", "euler")
    assert list(header.sigmas) == sigmas and header.steps == 4
    assert state.keys() == model.state_dict().keys()


def test_a_lora_that_the_package_writes_is_read_here(tmp_path):
    from dpdmd_pipeline.backbones import student_file

    timesteps = [999, 749, 499, 249]
    header = student_file.StudentHeader(
        family="sdxl",
        kind="lora",
        prediction="v",
        sampler="renoise",
        timesteps=timesteps,
        lora_rank=2,
        lora_alpha=4.0,
    )
    student_file.save_lora(tmp_path, factors("down.0.to_q"), header)
    state, metadata = weights.load_state(str(tmp_path / student_file.ADAPTER), "student")
    found = weights.read_header(metadata, "student")
    assert (found.family, found.kind, found.prediction, found.sampler) == ("sdxl", "lora", "v", "renoise")
    assert list(found.timesteps) == timesteps and found.steps == 4
    modules = weights.with_alphas(weights.lora_modules(state, found.family, "student"), found)
    assert modules["lora_unet_down_0_to_q"]["alpha"] == 4


def test_the_header_of_the_first_files_is_read_too():
    first = {key: value for key, value in FLOW.items() if key not in ("dpdmd.kind", "dpdmd.shift")}
    header = weights.read_header(first, "student")
    assert header.kind == "full" and header.shift is None


def test_headers_of_both_kinds_of_model_are_read():
    assert weights.read_header(FLOW, "x") == StudentHeader(
        "sd3", "full", "flow", "euler", sigmas=(1.0, 0.75, 0.5, 0.25, 0.0), shift=3.0
    )
    assert weights.read_header(EPS, "x") == StudentHeader(
        "sdxl", "lora", "eps", "renoise", timesteps=(999, 749, 499, 249), lora_rank=64, lora_alpha=128.0
    )


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "modelspec.title": "another model"}])
def test_files_of_others_have_no_header(metadata):
    assert weights.read_header(metadata, "x") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dpdmd.format": "2"}, r"x: dpdmd.format is '2', this pack reads '1': update the DP-DMD node pack"),
        ({"dpdmd.format": None}, r"dpdmd.format is None"),
        ({"dpdmd.family": None}, r"x: dpdmd.family is None; export the student again"),
        ({"dpdmd.kind": "partial"}, r"dpdmd.kind is 'partial', not one of full, lora"),
        ({"dpdmd.prediction": "x0"}, r"dpdmd.prediction is 'x0', not one of flow, eps, v"),
        ({"dpdmd.sampler": "heun"}, r"dpdmd.sampler is 'heun', not one of euler, renoise"),
        ({"dpdmd.guidance": "3.5"}, r"dpdmd.guidance is 3.5, students are sampled at 1.0"),
        ({"dpdmd.sigmas": None}, r"dpdmd.sigmas is None, not a list of numbers"),
        ({"dpdmd.sigmas": "[1, 0.5"}, r"dpdmd.sigmas is '\[1, 0.5', which cannot be read"),
        ({"dpdmd.sigmas": '[1, "a", 0]'}, r"not a list of numbers"),
        ({"dpdmd.sigmas": "[1, 0.5, 0.6, 0]"}, r"does not fall from at most 1 to 0"),
        ({"dpdmd.sigmas": "[1, 0.5]"}, r"does not fall from at most 1 to 0"),
        ({"dpdmd.sigmas": "[2, 1, 0]"}, r"does not fall from at most 1 to 0"),
        ({"dpdmd.sigmas": "[1, NaN, 0]"}, r"not a list of numbers"),
        ({"dpdmd.shift": "-1"}, r"dpdmd.shift is '-1', not a positive number"),
        ({"dpdmd.prediction": "v"}, r"dpdmd.timesteps is None, not a list of numbers"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[1, 2]"}, r"dpdmd.timesteps is \[1, 2\]"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[9.5, 2]"}, r"not falling integers"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[]"}, r"not falling integers"),
    ],
)
def test_an_impossible_header_is_refused(change, message):
    changed = {key: value for key, value in (FLOW | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        weights.read_header(changed, "x")


# ---- files


def test_tensors_and_metadata_of_a_safetensors_file_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(STATE, path, FLOW)
    state, metadata = weights.load_state(str(path), "x")
    assert metadata == FLOW and all(torch.equal(state[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("inside", [STATE, {"state_dict": STATE, "step": 3}, {"student": {"state_dict": STATE}}])
def test_a_state_dict_in_a_torch_file_is_found(tmp_path, inside):
    torch.save(inside, tmp_path / "x.pt")
    state, metadata = weights.load_state(str(tmp_path / "x.pt"), "x.pt")
    assert state.keys() == STATE.keys() and metadata is None


class Bomb:
    """What an attacker puts into a pickle."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "bomb": Bomb()}, "x.pt")
    with pytest.raises(ValueError, match="x.pt holds more than weights.*it was not run: save its state_dict as"):
        weights.load_state("x.pt", "x.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        ("x.safetensors", b"junk", OSError, "x.safetensors is no whole safetensors file"),
        ("x.safetensors", b"", OSError, "x.safetensors is no whole safetensors file"),
        ("x.pt", b"junk", OSError, "x.pt is no whole torch file"),
        ("x.pt", b"", OSError, "x.pt is no whole torch file"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path, name, content, error, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=message):
        weights.load_state(str(tmp_path / name), name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_truncated_file_is_refused(tmp_path, name):
    state = {f"{index}.weight": torch.ones(100, 100) for index in range(3)}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20000])
    with pytest.raises(OSError, match=f"{name} is no whole .* file.*again"):
        weights.load_state(str(tmp_path / name), name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "x.pt holds a list, not a state dict"),
        ({}, "x.pt holds a dict, not a state dict"),
        (STATE | {"epoch": 3}, r"x.pt holds more than tensors \(epoch\)"),
    ],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        weights.load_state(str(tmp_path / "x.pt"), "x.pt")


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "x.safetensors", FLOW)
    with pytest.raises(ValueError, match="x.safetensors holds no tensors"):
        weights.load_state(str(tmp_path / "x.safetensors"), "x.safetensors")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("diffusion_models/sd35.safetensors", ("diffusion_models", "sd35.safetensors")),
        ("loras/mine/sdxl.safetensors", ("loras", "mine/sdxl.safetensors")),
        ("loras/mine\\sdxl.safetensors", ("loras", "mine/sdxl.safetensors")),
    ],
)
def test_a_name_of_the_list_is_a_folder_and_a_file(name, parts):
    assert weights.folder_and_file(name) == parts


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors",
        "diffusion_models/../../secret.safetensors",
        "loras/..\\..\\secret.safetensors",
        "loras//etc/passwd",
        "/etc/passwd",
        "loras/C:\\secret.safetensors",
        "checkpoints/sd35.safetensors",
        "sd35.safetensors",
        "loras/",
        "",
    ],
)
def test_a_name_that_leaves_the_models_folder_is_refused(name):
    with pytest.raises(ValueError, match="is not inside models/diffusion_models or models/loras: put the file there"):
        weights.folder_and_file(name)


# ---- keys


@pytest.mark.parametrize("wrapper", ["", "transformer.", "module.", "student.module.transformer.", "unet."])
def test_what_stands_before_every_key_is_taken_away(wrapper):
    wrapped = {f"{wrapper}transformer_blocks.{key}": value for key, value in STATE.items()}
    assert weights.without_wrappers(wrapped).keys() == {f"transformer_blocks.{key}" for key in STATE}


def test_what_stands_before_some_keys_alone_stays():
    state = {"transformer.a": STATE["a.weight"], "b": STATE["b.bias"]}
    assert weights.without_wrappers(state).keys() == state.keys()


def test_keys_too_many_or_missing_are_named_by_the_first_three():
    weights.check_keys("ab", "ab", "x")
    with pytest.raises(ValueError, match=r"x has 4 keys that the network lacks \(c, d, e, ...\): export it again"):
        weights.check_keys("abcdef", "ab", "x")
    with pytest.raises(ValueError, match=r"x lacks 1 of 2 keys \(b\): export it again"):
        weights.check_keys("a", "ab", "x")


def factors(module, rank=2, size=(6, 3), names=("lora_A.weight", "lora_B.weight")):
    return {f"{module}.{names[0]}": torch.ones(rank, size[1]), f"{module}.{names[1]}": torch.ones(size[0], rank)}


@pytest.mark.parametrize(
    ("family", "module", "expected"),
    [
        ("sd3", "transformer.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "base_model.model.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "base_model.model.transformer.blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sd3", "blocks.0.to_q", "transformer.blocks.0.to_q"),
        ("sdxl", "unet.down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "base_model.model.down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "down.0.to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "lora_unet_down_0_to_q", "lora_unet_down_0_to_q"),
        ("sdxl", "diffusion_model.input.0.to_q", "diffusion_model.input.0.to_q"),
    ],
)
def test_every_spelling_of_a_loras_module_becomes_the_one_that_comfyui_reads(family, module, expected):
    for names in (
        ("lora_A.weight", "lora_B.weight"),
        ("lora_A.default.weight", "lora_B.default.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ):
        state = factors(module, names=names) | {f"{module}.alpha": torch.tensor(4.0)}
        assert weights.is_lora(state)
        found = weights.lora_modules(state, family, "x")
        assert found.keys() == {expected} and found[expected].keys() == {"lora_down", "lora_up", "alpha"}


def test_a_full_student_is_no_lora():
    assert not weights.is_lora(STATE)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (factors("a") | {"clip.weight": torch.ones(2)}, r"x has 1 keys of no LoRA \(clip.weight\)"),
        (factors("a") | {"b.lora_A.weight": torch.ones(2, 2)}, r"x has only one factor of 1 modules \(transformer.b\)"),
        (factors("a") | {"c.alpha": torch.tensor(1.0)}, r"only one factor of 1 modules \(transformer.c\)"),
    ],
)
def test_a_lora_with_strange_keys_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        weights.lora_modules(state, "sd3", "x")


def test_alpha_is_the_tensors_where_there_is_one_else_the_headers_else_the_rank():
    header = weights.read_header(EPS, "x")  # alpha 128, rank 64
    modules = weights.lora_modules(factors("a", rank=4) | {"a.alpha": torch.tensor(3.0)} | factors("b"), "sdxl", "x")
    found = weights.with_alphas(modules, header)
    assert found["lora_unet_a"]["alpha"] == 3 and found["lora_unet_b"]["alpha"] == 2 * 128 / 64
    assert "alpha" not in weights.with_alphas(modules, None)["lora_unet_b"]


def test_a_lora_that_does_not_fit_the_base_model_is_refused():
    modules = weights.lora_modules(factors("a") | factors("b"), "sd3", "x")
    fitting = {"transformer.a": (6, 3), "transformer.b": (6, 3)}
    weights.check_lora(modules, fitting, "x")
    with pytest.raises(ValueError, match=r"x: none of its 2 modules is in the base model \(transformer.a, "):
        weights.check_lora(modules, {}, "x")
    with pytest.raises(ValueError, match=r"x: the base model lacks 1 modules \(transformer.b\)"):
        weights.check_lora(modules, {"transformer.a": (6, 3)}, "x")
    with pytest.raises(ValueError, match=r"x: transformer.b is for a weight of \[6, 3\], the base model's is \[6, 4\]"):
        weights.check_lora(modules, fitting | {"transformer.b": (6, 4)}, "x")


def test_a_lora_of_a_convolution_fits_its_weight():
    state = {"a.lora_A.weight": torch.ones(2, 3, 3, 3), "a.lora_B.weight": torch.ones(6, 2, 1, 1)}
    weights.check_lora(weights.lora_modules(state, "sdxl", "x"), {"lora_unet_a": (6, 3, 3, 3)}, "x")


def test_the_readers_schema_is_the_writers():
    """Everything that a sampler must know is in both classes under the same name."""
    from dpdmd_pipeline.backbones import student_file

    written = student_file.StudentHeader(family="sd3", sigmas=[1.0, 0.5, 0.0]).metadata()
    header = weights.read_header(written, "x")
    assert json.loads(written["dpdmd.sigmas"]) == list(header.sigmas)
    assert vars(header).keys() <= {field for field in student_file.StudentHeader.__dataclass_fields__}
