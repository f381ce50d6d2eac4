"""Student files: weights and metadata are read, and files that are damaged or hold something else are refused."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from comfy_nodes.header import read_header
from comfy_nodes.limits import MAX_DEPTH, LimitError
from safetensors.torch import save_file
from tests.raising import refuses

from comfy_nodes import weights

METADATA = {"format": "pt", "dpdmd.format": "1"}
STATE = {"a.weight": torch.ones(2, 3), "b.bias": torch.zeros(4)}


def test_a_student_that_the_package_writes_is_read_here(tmp_path):
    from diffusers import SD3Transformer2DModel

    from dpdmd_pipeline.backbones import student_file

    model = SD3Transformer2DModel(
        sample_size=4, num_layers=1, num_attention_heads=1, caption_projection_dim=64, joint_attention_dim=8
    )
    sigmas = [1.0, 0.75, 0.5, 0.25, 0.0]
    student_file.save_student(tmp_path, model, student_file.StudentHeader(family="sd3", sigmas=sigmas))
    state, metadata = weights.load_state(str(tmp_path / student_file.WEIGHTS), "student")
    header = read_header(metadata, "student")
    assert (header.family, header.kind, header.prediction, header.sampler) == ("sd3", "full", "flow", "euler")
    assert list(header.sigmas) == sigmas and header.steps == 4
    assert state.keys() == model.state_dict().keys()


# ---- files


def test_tensors_and_metadata_of_a_safetensors_file_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(STATE, path, METADATA)
    state, metadata = weights.load_state(str(path), "x")
    assert metadata == METADATA and all(torch.equal(state[key], STATE[key]) for key in STATE)


def test_a_file_with_a_header_looks_like_a_student_and_others_do_not(tmp_path):
    path = tmp_path / "x.safetensors"
    assert not weights.looks_like_student(str(path)) and not weights.looks_like_student(None)
    save_file(STATE, path)
    assert not weights.looks_like_student(str(path))
    save_file(STATE, path, METADATA)
    assert weights.looks_like_student(str(path))


@pytest.mark.parametrize("content", [STATE, {"state_dict": STATE, "step": 3}, {"student": {"state_dict": STATE}}])
def test_a_state_dict_in_a_torch_file_is_found(tmp_path, content):
    torch.save(content, tmp_path / "x.pt")
    state, metadata = weights.load_state(str(tmp_path / "x.pt"), "x.pt")
    assert state.keys() == STATE.keys() and metadata is None


class Bomb:
    """An object that runs a command while it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": STATE, "bomb": Bomb()}, "x.pt")
    with refuses(ValueError, "x.pt", "not run"):
        weights.load_state("x.pt", "x.pt")
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    ("name", "content"), [("x.safetensors", b"junk"), ("x.safetensors", b""), ("x.pt", b"junk"), ("x.pt", b"")]
)
def test_a_file_of_another_format_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with refuses(OSError, name):
        weights.load_state(str(tmp_path / name), name)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_truncated_file_is_refused(tmp_path, name):
    state = {f"{index}.weight": torch.ones(100, 100) for index in range(3)}
    save_file(state, tmp_path / name) if name.endswith("safetensors") else torch.save(state, tmp_path / name)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-20000])
    with refuses(OSError, name):
        weights.load_state(str(tmp_path / name), name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "x.pt .*list"),
        ({}, "x.pt .*dict"),
        (STATE | {"epoch": 3}, r"x.pt .*\(epoch\)"),
        (STATE | {7: torch.ones(2)}, r"x.pt .*type int"),
    ],
)
def test_a_torch_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        weights.load_state(str(tmp_path / "x.pt"), "x.pt")


def nested(depth):
    """A state dict in `depth` - 1 other dicts."""
    state = STATE
    for _ in range(depth - 1):
        state = {"state_dict": state, "step": 3}
    return state


def test_dicts_in_each_other_are_read_up_to_the_limit(tmp_path):
    torch.save(nested(MAX_DEPTH), tmp_path / "x.pt")
    assert weights.load_state(str(tmp_path / "x.pt"), "x.pt")[0].keys() == STATE.keys()


@pytest.mark.parametrize("kind", ["itself", "each other", "too deep"])
def test_a_state_dict_without_an_end_is_refused(tmp_path, kind):
    state = {"step": 3}
    state["state_dict"] = {"model": state} if kind == "each other" else state
    torch.save(nested(MAX_DEPTH + 1) if kind == "too deep" else state, tmp_path / "x.pt")
    with refuses(LimitError, "x.pt", str(MAX_DEPTH)):
        weights.load_state(str(tmp_path / "x.pt"), "x.pt")


def test_a_compressed_torch_file_is_refused_before_it_is_unpacked(tmp_path):
    torch.save({"a": torch.zeros(10**5)}, tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as stored,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as compressed,
    ):
        for entry in stored.namelist():
            compressed.writestr(entry, stored.read(entry))
    with refuses(LimitError, "x.pt", "bytes"):
        weights.load_state(str(tmp_path / "x.pt"), "x.pt")


def test_a_torch_file_of_the_older_format_is_read(tmp_path):
    torch.save(STATE, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    assert weights.load_state(str(tmp_path / "x.pt"), "x.pt")[0].keys() == STATE.keys()


def test_a_file_without_tensors_is_refused(tmp_path):
    save_file({}, tmp_path / "x.safetensors", METADATA)
    with refuses(ValueError, "x.safetensors", "no tensors"):
        weights.load_state(str(tmp_path / "x.safetensors"), "x.safetensors")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("diffusion_models/sd35.safetensors", ("diffusion_models", "sd35.safetensors")),
        ("loras/mine/sdxl.safetensors", ("loras", "mine/sdxl.safetensors")),
        ("loras/mine\\sdxl.safetensors", ("loras", "mine/sdxl.safetensors")),
    ],
)
def test_an_entry_of_the_list_is_a_folder_and_a_file(name, parts):
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
    with refuses(ValueError, "student_name", "models/diffusion_models", "models/loras"):
        weights.folder_and_file(name)


# ---- keys


@pytest.mark.parametrize("wrapper", ["", "transformer.", "module.", "student.module.transformer.", "unet."])
def test_a_prefix_of_every_key_is_removed(wrapper):
    wrapped = {f"{wrapper}transformer_blocks.{key}": value for key, value in STATE.items()}
    assert weights.without_wrappers(wrapped).keys() == {f"transformer_blocks.{key}" for key in STATE}


def test_removing_prefixes_ends():
    assert weights.without_wrappers({}) == {}
    state = {"module." * (MAX_DEPTH + 2) + "weight": STATE["b.bias"]}
    assert weights.without_wrappers(state).keys() == {"module.module.weight"}


def test_a_long_key_is_cut_in_messages():
    with refuses(ValueError, "aaa... (1000000 characters)") as error:
        weights.check_keys(["a" * 10**6], [], "x")
    assert len(str(error.value)) < 400


def test_a_prefix_of_some_keys_stays():
    state = {"transformer.a": STATE["a.weight"], "b": STATE["b.bias"]}
    assert weights.without_wrappers(state).keys() == state.keys()


def test_the_first_three_surplus_or_missing_keys_are_named():
    weights.check_keys("ab", "ab", "x")
    with refuses(ValueError, "x", "4 keys", "(c, d, e, ...)"):
        weights.check_keys("abcdef", "ab", "x")
    with refuses(ValueError, "x lacks 1 of 2 keys (b)"):
        weights.check_keys("a", "ab", "x")
