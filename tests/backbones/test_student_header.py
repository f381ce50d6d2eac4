"""The header: its metadata keys, and the values that no sampler could follow."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tests.raising import refuses

from comfy_nodes import limits as comfy_limits
from dpdmd_pipeline import limits
from dpdmd_pipeline.backbones.networks import WEIGHTS, check_keys, network_files
from dpdmd_pipeline.backbones.student_file import load_header
from dpdmd_pipeline.backbones.student_header import StudentHeader

FLOW = StudentHeader("sd3", [1.0, 0.75, 0.0], shift=3.0)
VP = StudentHeader("sdxl", prediction="eps", timesteps=[999, 749, 499, 249])
LORA = replace(FLOW, kind="lora", lora_rank=2, lora_alpha=3.0)
ALL_FACTS = replace(VP, prediction="v", sampler="renoise", resolution=1024, max_sequence_length=0)


@pytest.mark.parametrize("header", [FLOW, VP, LORA, ALL_FACTS], ids=["flow", "vp", "lora", "all facts"])
def test_a_header_is_read_as_it_was_written(tmp_path, header):
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS, metadata=header.metadata() | {"modelspec.title": "mine"})
    assert load_header(tmp_path) == load_header(tmp_path / WEIGHTS) == header


def test_the_metadata_are_those_of_the_contract():
    assert LORA.metadata() == {
        "format": "pt",
        "dpdmd.format": "1",
        "dpdmd.family": "sd3",
        "dpdmd.kind": "lora",
        "dpdmd.prediction": "flow",
        "dpdmd.sampler": "euler",
        "dpdmd.sigmas": "[1.0, 0.75, 0.0]",
        "dpdmd.shift": "3.0",
        "dpdmd.guidance": "1.0",
        "dpdmd.lora_rank": "2",
        "dpdmd.lora_alpha": "3.0",
    }
    assert VP.metadata()["dpdmd.timesteps"] == "[999, 749, 499, 249]" and "dpdmd.sigmas" not in VP.metadata()


def test_a_student_of_the_first_version_still_loads(tmp_path):
    old = {key: value for key, value in FLOW.metadata().items() if key not in ("dpdmd.kind", "dpdmd.shift")}
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS, metadata=old)
    assert load_header(tmp_path) == StudentHeader("sd3", [1.0, 0.75, 0.0])
    assert load_header(tmp_path).kind == "full" and load_header(tmp_path).shift is None


def test_a_header_counts_its_steps_and_names_its_grid():
    assert (FLOW.num_steps, FLOW.grid) == (2, [1.0, 0.75])
    assert (VP.num_steps, VP.grid) == (4, [999, 749, 499, 249])


def refusal(header, changes):
    with pytest.raises(ValueError) as error:
        replace(header, **changes)
    return str(error.value)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"kind": "dora"}, ["full, lora"]),
        ({"prediction": "x0"}, ["flow, eps, v"]),
        ({"sampler": "heun"}, ["euler, renoise"]),
        ({"family": "sd9"}, ["sd3, sdxl, sana"]),
        ({"guidance": 3.5}, ["1.0"]),
        ({"sigmas": None}, []),
        ({"sigmas": [0.0]}, ["fall strictly", "1 to 0"]),
        ({"sigmas": [1.0, 0.5, 0.1]}, ["fall strictly", "1 to 0"]),
        ({"sigmas": [1.0, 1.0, 0.0]}, ["fall strictly"]),
        ({"sigmas": [1.5, 0.5, 0.0]}, ["1 to 0"]),
        ({"sigmas": [float("nan"), 0.0]}, []),
        ({"timesteps": [999]}, ["eps", "sigmas"]),
        ({"shift": -1.0}, ["positive"]),
        ({"lora_rank": 4}, ["kind lora"]),
        ({"kind": "lora", "lora_rank": 0, "lora_alpha": 1.0}, ["dpdmd.lora_rank is 0"]),
        ({"kind": "lora", "lora_rank": 4}, ["dpdmd.lora_alpha is None"]),
        ({"resolution": 0}, ["1 to 16384"]),
    ],
)
def test_values_that_no_flow_sampler_could_follow_are_refused(changes, facts):
    message = refusal(FLOW, changes)
    if len(changes) == 1:
        ((key, value),) = changes.items()
        assert f"dpdmd.{key} is {value!r}" in message
    assert all(fact in message for fact in facts)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"timesteps": None}, []),
        ({"timesteps": []}, ["integers", "fall strictly", "1000"]),
        ({"timesteps": [1000, 5]}, ["1000 to 0"]),
        ({"timesteps": [999, -1]}, []),
        ({"timesteps": [999, 499.5]}, ["integers"]),
        ({"timesteps": [499, 999]}, ["fall strictly"]),
        ({"sigmas": [1.0, 0.0]}, ["flow", "eps", "timesteps"]),
        ({"shift": 3.0}, ["flow"]),
    ],
)
def test_values_that_no_diffusion_sampler_could_follow_are_refused(changes, facts):
    message = refusal(VP, changes)
    ((key, value),) = changes.items()
    assert f"dpdmd.{key} is {value!r}" in message and all(fact in message for fact in facts)


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"dpdmd.format": "2"}, ["dpdmd.format", "'2'", "'1'"]),
        ({"dpdmd.family": None}, ["dpdmd.family", "missing"]),
        ({"dpdmd.sigmas": "[1.0, "}, ["dpdmd.sigmas is '[1.0, '"]),
        ({"dpdmd.sigmas": "[0.5, 1.0]"}, ["dpdmd.sigmas is [0.5, 1.0]", "fall strictly"]),
        ({"dpdmd.family": "x" * 1_000_000}, ["dpdmd.family", "1000000 characters", "65536"]),
        ({"dpdmd.format": "x" * 1_000_000}, ["dpdmd.format", "..."]),
        ({"dpdmd.sigmas": "[" * 5000 + "]" * 5000}, ["dpdmd.sigmas", "5000 lists", "8"]),
        ({"dpdmd.recipe": '{"a":' * 5000 + "1" + "}" * 5000}, ["dpdmd.recipe", "5000 lists and objects", "8"]),
        ({"dpdmd.sigmas": f"[1, {10**400}, 0]"}, ["dpdmd.sigmas", "fall strictly"]),
        ({"dpdmd.shift": str(10**400)}, ["dpdmd.shift", "positive number"]),
        ({"dpdmd.shift": "1" + "0" * 5000}, ["dpdmd.shift", "5001"]),
        ({"dpdmd.sigmas": json.dumps([1 - i / 20_000 for i in range(20_001)])}, ["dpdmd.sigmas", "65536"]),
        ({"dpdmd.sigmas": json.dumps([round(1 - i / 5000, 4) for i in range(5001)])}, ["dpdmd.sigmas", "1001 numbers"]),
        ({"dpdmd.sigmas": json.dumps([0] * 1_000_000)}, ["dpdmd.sigmas", "3000000 characters"]),
        ({"dpdmd.resolution": "1000000000"}, ["dpdmd.resolution is 1000000000", "16384"]),
        ({"dpdmd.kind": "lora", "dpdmd.lora_alpha": "4"}, ["dpdmd.lora_rank is None", "1 to 16384"]),
        ({"dpdmd.kind": "lora", "dpdmd.lora_alpha": "4", "dpdmd.lora_rank": str(10**400)}, ["dpdmd.lora_rank"]),
    ],
)
def test_a_file_with_a_wrong_header_is_refused_by_its_path(tmp_path, changes, facts):
    metadata = {key: value for key, value in (FLOW.metadata() | changes).items() if value is not None}
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError) as error:
        load_header(tmp_path)
    assert all(fact in str(error.value) for fact in [str(tmp_path / WEIGHTS), *facts])
    assert len(str(error.value)) < 1000


def test_the_limits_are_those_of_the_node_pack():
    ours, theirs = vars(limits), vars(comfy_limits)
    shared = [name for name in theirs if name.startswith("MAX_")]
    assert len(shared) == 4 and {name: ours[name] for name in shared} == {name: theirs[name] for name in shared}


@pytest.mark.parametrize(
    "text, fact", [("[" * 5000, "recursion"), ("[1]", "[1]"), ("{", "cannot be read"), ('{"a": 1}', "no weight_map")]
)
def test_an_index_of_a_stranger_is_refused_by_its_path(tmp_path, text, fact):
    (tmp_path / f"{WEIGHTS}.index.json").write_text(text)
    with refuses(ValueError, str(tmp_path / f"{WEIGHTS}.index.json"), fact):
        network_files(tmp_path)


def test_a_long_name_of_a_tensor_is_shortened_in_the_message(tmp_path):
    save_file({"x" * 1_000_000: torch.zeros(1)}, tmp_path / WEIGHTS)
    with refuses(ValueError, "1 unknown (xxx", "...") as error:
        check_keys([tmp_path / WEIGHTS], {})
    assert len(str(error.value)) < 1000
