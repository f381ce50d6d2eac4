"""The contract: what a header may say, and which weights a network takes."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from dpdmd_pipeline.backbones.student_file import (
    ADAPTER,
    WEIGHTS,
    StudentHeader,
    check_network,
    load_header,
    load_lora,
    load_weights,
    save_lora,
    save_student,
    save_weights,
)

FLOW = StudentHeader("sd3", [1.0, 0.75, 0.0], shift=3.0)
VP = StudentHeader("sdxl", prediction="eps", timesteps=[999, 749, 499, 249])
LORA = replace(FLOW, kind="lora", lora_rank=2, lora_alpha=3.0)
FULLY_TOLD = replace(VP, prediction="v", sampler="renoise", resolution=1024, max_sequence_length=0)


class Network(nn.Sequential):
    """A network with a config, as diffusers' are."""

    def __init__(self):
        super().__init__(nn.Linear(3, 4), nn.Conv2d(4, 2, 3))

    def save_config(self, folder):
        (folder / "config.json").write_text(json.dumps({"_name_or_path": "/home/me/teacher", "width": 4}))


@pytest.fixture
def network():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Network()


def adapter(rank=2):
    return {
        "0.lora_A.weight": torch.randn(rank, 3),
        "0.lora_B.weight": torch.randn(4, rank),
        "1.lora_A.weight": torch.randn(rank, 4, 3, 3),
        "1.lora_B.weight": torch.randn(2, rank, 1, 1),
    }


# ---- header


@pytest.mark.parametrize("header", [FLOW, VP, LORA, FULLY_TOLD], ids=["flow", "vp", "lora", "all facts"])
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


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "dora"}, "dpdmd.kind is 'dora': choose one of full, lora"),
        ({"prediction": "x0"}, "dpdmd.prediction is 'x0': choose one of flow, eps, v"),
        ({"sampler": "heun"}, "dpdmd.sampler is 'heun': choose one of euler, renoise"),
        ({"family": "sd9"}, "dpdmd.family is 'sd9': choose one of sd3, "),
        ({"guidance": 3.5}, "dpdmd.guidance is 3.5: a student is sampled without guidance"),
        ({"sigmas": None}, "dpdmd.sigmas is None"),
        (
            {"sigmas": [0.0]},
            r"dpdmd.sigmas is \[0.0\]: give at least two numbers that fall strictly from at most 1 to 0",
        ),
        ({"sigmas": [1.0, 0.5, 0.1]}, "fall strictly from at most 1 to 0"),
        ({"sigmas": [1.0, 1.0, 0.0]}, "fall strictly"),
        ({"sigmas": [1.5, 0.5, 0.0]}, "at most 1"),
        ({"sigmas": [float("nan"), 0.0]}, "dpdmd.sigmas"),
        ({"timesteps": [999]}, r"dpdmd.timesteps is \[999\]: belong to eps and v"),
        ({"shift": -1.0}, "dpdmd.shift is -1.0: give a positive number"),
        ({"lora_rank": 4}, "dpdmd.lora_rank is 4: belongs to kind lora"),
        ({"kind": "lora", "lora_rank": 0, "lora_alpha": 1.0}, "dpdmd.lora_rank is 0"),
        ({"kind": "lora", "lora_rank": 4}, "dpdmd.lora_alpha is None"),
        ({"resolution": 0}, "dpdmd.resolution is 0"),
    ],
)
def test_what_no_sampler_could_follow_is_refused_for_flow(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(FLOW, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"timesteps": None}, "dpdmd.timesteps is None"),
        ({"timesteps": []}, r"dpdmd.timesteps is \[\]: give integers that fall strictly from below 1000 to 0"),
        ({"timesteps": [1000, 5]}, "below 1000"),
        ({"timesteps": [999, -1]}, "dpdmd.timesteps"),
        ({"timesteps": [999, 499.5]}, "give integers"),
        ({"timesteps": [499, 999]}, "fall strictly"),
        ({"sigmas": [1.0, 0.0]}, "dpdmd.sigmas .* belongs to flow, prediction eps has timesteps"),
        ({"shift": 3.0}, "dpdmd.shift .* belongs to flow"),
    ],
)
def test_what_no_sampler_could_follow_is_refused_for_diffusion(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(VP, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"dpdmd.format": "2"}, "dpdmd.format is '2', this version reads '1'"),
        ({"dpdmd.family": None}, "dpdmd.family is missing"),
        ({"dpdmd.sigmas": "[1.0, "}, r"dpdmd.sigmas is '\[1.0, ': it cannot be read"),
        ({"dpdmd.sigmas": "[0.5, 1.0]"}, r"dpdmd.sigmas is \[0.5, 1.0\]: .* fall strictly"),
    ],
)
def test_a_file_whose_header_is_wrong_is_refused_by_its_name(tmp_path, changes, message):
    metadata = {key: value for key, value in (FLOW.metadata() | changes).items() if value is not None}
    save_file({"weight": torch.zeros(1)}, tmp_path / WEIGHTS, metadata=metadata)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: {message}"):
        load_header(tmp_path)


# ---- writing


@pytest.mark.parametrize("save", ["student", "lora"])
def test_the_same_student_gives_the_same_bytes_and_names_no_path_of_this_machine(tmp_path, network, save):
    state = adapter()
    for number in range(4):
        (tmp_path / str(number)).mkdir()
        if save == "student":
            save_student(tmp_path / str(number), network, FLOW)
        else:
            save_lora(tmp_path / str(number), state, LORA)
    name = WEIGHTS if save == "student" else ADAPTER
    assert len({(tmp_path / str(number) / name).read_bytes() for number in range(4)}) == 1
    assert "/home" not in (tmp_path / "0/config.json").read_text()


def test_weights_that_are_not_finite_are_not_written(tmp_path, network):
    network[0].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"weights are not finite \(0.weight\)"):
        save_student(tmp_path, network, FLOW)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize(
    "state, message",
    [
        (adapter(rank=3), "dpdmd.lora_rank is 2, but 0.lora_A.weight has rank 3"),
        ({"0.lora_A.weight": torch.zeros(2, 3)}, "no LoRA of pairs .*: 0.lora_B.weight"),
        (adapter() | {"0.bias": torch.zeros(4)}, "no LoRA of pairs"),
        ({}, "no LoRA of pairs"),
    ],
)
def test_what_is_no_lora_of_its_rank_is_refused(tmp_path, state, message):
    with pytest.raises(ValueError, match=message):
        save_lora(tmp_path, state, LORA)


def test_an_adapter_is_not_written_as_full_weights(tmp_path):
    with pytest.raises(ValueError, match="dpdmd.kind is 'full'"):
        save_lora(tmp_path, adapter(), FLOW)


# ---- reading


def test_a_student_replaces_every_weight_in_the_precision_of_the_network(tmp_path, network):
    save_student(tmp_path, network, FLOW)
    other = Network().to(torch.bfloat16)
    load_weights(tmp_path, other, "sd3")
    for name, value in other.state_dict().items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, network.state_dict()[name].to(torch.bfloat16))


def test_a_lora_is_added_to_the_weights_with_its_scale(tmp_path, network):
    state, before = adapter(), {name: value.clone() for name, value in network.state_dict().items()}
    save_lora(tmp_path, state, LORA)
    load_weights(tmp_path, network, "sd3")
    after = network.state_dict()
    change = 1.5 * state["0.lora_B.weight"] @ state["0.lora_A.weight"]
    torch.testing.assert_close(after["0.weight"], before["0.weight"] + change)
    assert not torch.equal(after["1.weight"], before["1.weight"]) and torch.equal(after["0.bias"], before["0.bias"])


def test_an_adapter_is_read_as_it_was_written(tmp_path):
    state = adapter()
    save_lora(tmp_path, state, LORA)
    found, header = load_lora(tmp_path)
    assert header == LORA and all(torch.equal(found[name], state[name]) for name in state)
    assert found.keys() == state.keys() and (tmp_path / "config.json").is_file()


def changed(path, change):
    """Rewrite a weight file after a change of its tensors."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=FLOW.metadata())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update(extra=torch.zeros(1)), r"1 unknown \(extra\) and 0 missing \(none\)"),
        (lambda t: t.pop("1.bias"), r"0 unknown \(none\) and 1 missing \(1.bias\)"),
        (lambda t: [t.pop(name) for name in list(t)], r"4 missing \(0.bias, 0.weight, 1.bias, \.\.\.\)"),
        (lambda t: t.update({"0.bias": torch.zeros(9)}), r"1 of other shapes \(0.bias \[9\] instead of \[4\]\)"),
        (lambda t: t["0.bias"].fill_(torch.nan), r"weights are not finite \(0.bias\)"),
    ],
    ids=["one more", "one less", "none", "another shape", "not finite"],
)
def test_weights_that_do_not_fit_are_refused_and_the_first_three_named(tmp_path, network, change, message):
    save_student(tmp_path, network, FLOW)
    changed(tmp_path / WEIGHTS, change)
    with pytest.raises(ValueError, match=message):
        load_weights(tmp_path, Network(), "sd3")


@pytest.mark.parametrize("shards", [1, 2])
def test_a_teachers_network_in_one_file_or_several_is_held_to_its_architecture(tmp_path, network, shards):
    parts = [dict(list(network.state_dict().items())[number::shards]) for number in range(shards)]
    names = [WEIGHTS] if shards == 1 else ["one.safetensors", "two.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    if shards > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_network(tmp_path, network)
    save_file({name: value for name, value in parts[0].items() if name != "0.weight"}, tmp_path / names[0])
    with pytest.raises(ValueError, match=r"1 missing \(0.weight\)"):
        check_network(tmp_path, network)


def test_a_student_of_another_family_is_refused(tmp_path, network):
    save_student(tmp_path, network, FLOW)
    with pytest.raises(ValueError, match="the student is of family 'sd3', the teacher of 'sdxl'"):
        load_weights(tmp_path, network, "sdxl")


def test_weights_without_a_header_of_ours_are_held_to_the_keys_alone(tmp_path, network):
    save_file(network.state_dict(), tmp_path / WEIGHTS)
    other = Network()
    load_weights(tmp_path, other, "sd3")
    assert torch.equal(other[0].weight, network[0].weight)


def test_a_lora_that_matches_nothing_is_refused(tmp_path, network):
    state = {name.replace("0.", "block.").replace("1.", "other."): value for name, value in adapter().items()}
    save_lora(tmp_path, state, LORA)
    with pytest.raises(ValueError, match=r"2 of 2 modules of the LoRA are none of the network's \(block, other\)"):
        load_weights(tmp_path, network, "sd3")


@pytest.mark.parametrize("place", ["weights.pt", "folder"])
def test_a_pickle_is_refused_without_being_opened(tmp_path, network, place):
    bomb = tmp_path / "weights.pt"
    bomb.write_bytes(b"cos\nabort\n(tR.")  # ends the process that unpickles it
    with pytest.raises(ValueError, match="weights.pt is a pickle, which can run any program .* weights_only=True"):
        load_weights(bomb if place == "weights.pt" else tmp_path, network, "sd3")


def test_a_torn_file_is_refused_by_its_name(tmp_path, network):
    save_student(tmp_path, network, FLOW)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=rf"{WEIGHTS} is no whole safetensors file"):
        load_weights(tmp_path, network, "sd3")


def test_a_folder_without_weights_is_refused(tmp_path, network):
    with pytest.raises(FileNotFoundError, match="no student weights there; run `kedro run --pipelines train` first"):
        load_weights(tmp_path, network, "sd3")


def test_full_weights_are_no_lora(tmp_path, network):
    save_weights(tmp_path / WEIGHTS, network.state_dict(), FLOW.metadata())
    with pytest.raises(ValueError, match="dpdmd.kind is 'full', a LoRA was asked for"):
        load_lora(tmp_path)
