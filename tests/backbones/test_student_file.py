"""Files of students: the same bytes every time, and only weights that fit the network."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.raising import refuses
from torch import nn

from dpdmd_pipeline.backbones.networks import WEIGHTS, check_keys, network_files, shapes_of
from dpdmd_pipeline.backbones.student_file import ADAPTER, load_lora, load_weights, save_lora, save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import CHECKSUM, check_content, save_weights
from dpdmd_pipeline.errors import MissingInputError

FLOW = StudentHeader("sd3", [1.0, 0.75, 0.0], shift=3.0)
LORA = replace(FLOW, kind="lora", lora_rank=2, lora_alpha=3.0)


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
    with refuses(ValueError, "finite (0.weight)"):
        save_student(tmp_path, network, FLOW)
    assert not (tmp_path / WEIGHTS).exists()


@pytest.mark.parametrize(
    "state, facts",
    [
        (adapter(rank=3), ["dpdmd.lora_rank is 2", "0.lora_A.weight", "rank 3"]),
        ({"0.lora_A.weight": torch.zeros(2, 3)}, ["LoRA", "0.lora_B.weight"]),
        (adapter() | {"0.bias": torch.zeros(4)}, ["LoRA", "0.bias"]),
        ({}, ["LoRA", "no keys"]),
    ],
)
def test_a_state_that_is_no_lora_of_the_headers_rank_is_refused(tmp_path, state, facts):
    with pytest.raises(ValueError) as error:
        save_lora(tmp_path, state, LORA)
    assert all(fact in str(error.value) for fact in facts)


def test_an_adapter_is_not_written_as_full_weights(tmp_path):
    with refuses(ValueError, "dpdmd.kind is 'full'"):
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
    loaded, header = load_lora(tmp_path)
    assert header == LORA and all(torch.equal(loaded[name], state[name]) for name in state)
    assert loaded.keys() == state.keys() and (tmp_path / "config.json").is_file()


def rewrite(path, change):
    """Change the tensors of a weight file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=FLOW.metadata())


@pytest.mark.parametrize(
    "change, fact",
    [
        (lambda t: t.update(extra=torch.zeros(1)), "1 unknown (extra)"),
        (lambda t: t.pop("1.bias"), "1 missing (1.bias)"),
        (lambda t: [t.pop(name) for name in list(t)], "4 missing (0.bias, 0.weight, 1.bias and 1 more)"),
        (lambda t: t.update({"0.bias": torch.zeros(9)}), "1 resized (0.bias [9] instead of [4])"),
        (lambda t: t["0.bias"].fill_(torch.nan), "finite (0.bias)"),
    ],
    ids=["one more", "one less", "none", "another shape", "not finite"],
)
def test_weights_that_do_not_fit_are_refused_with_the_first_three_names(tmp_path, network, change, fact):
    save_student(tmp_path, network, FLOW)
    rewrite(tmp_path / WEIGHTS, change)
    with pytest.raises(ValueError) as error:
        load_weights(tmp_path, Network(), "sd3")
    assert fact in str(error.value)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_teachers_network_in_one_file_or_several_is_held_against_its_architecture(tmp_path, network, shards):
    parts = [dict(list(network.state_dict().items())[number::shards]) for number in range(shards)]
    names = [WEIGHTS] if shards == 1 else ["one.safetensors", "two.safetensors"]
    for name, part in zip(names, parts, strict=True):
        save_file(part, tmp_path / name)
    if shards > 1:
        weight_map = {key: name for name, part in zip(names, parts, strict=True) for key in part}
        (tmp_path / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    check_keys(network_files(tmp_path), shapes_of(network))
    save_file({name: value for name, value in parts[0].items() if name != "0.weight"}, tmp_path / names[0])
    with refuses(ValueError, "1 missing (0.weight)"):
        check_keys(network_files(tmp_path), shapes_of(network))


def test_a_student_of_another_family_is_refused(tmp_path, network):
    save_student(tmp_path, network, FLOW)
    with refuses(ValueError, "'sd3'", "'sdxl'"):
        load_weights(tmp_path, network, "sdxl")


def test_weights_without_a_header_are_held_against_the_keys_alone(tmp_path, network):
    save_file(network.state_dict(), tmp_path / WEIGHTS)
    other = Network()
    load_weights(tmp_path, other, "sd3")
    assert torch.equal(other[0].weight, network[0].weight)


def test_a_lora_that_matches_no_module_is_refused(tmp_path, network):
    state = {name.replace("0.", "block.").replace("1.", "other."): value for name, value in adapter().items()}
    save_lora(tmp_path, state, LORA)
    with refuses(ValueError, "2 of 2", "(block, other)"):
        load_weights(tmp_path, network, "sd3")


@pytest.mark.parametrize("argument", ["weights.pt", "folder"])
def test_a_pickle_is_refused_without_being_opened(tmp_path, network, argument):
    bomb = tmp_path / "weights.pt"
    bomb.write_bytes(b"cos\nabort\n(tR.")  # ends the process that unpickles it
    with refuses(ValueError, "weights.pt", "weights_only=True"):
        load_weights(bomb if argument == "weights.pt" else tmp_path, network, "sd3")


def test_a_truncated_file_is_refused_by_its_path(tmp_path, network):
    save_student(tmp_path, network, FLOW)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with refuses(OSError, WEIGHTS):
        load_weights(tmp_path, network, "sd3")


@pytest.mark.parametrize("part", ["header", "weights"])
def test_a_damaged_student_is_refused_by_its_path(tmp_path, network, part):
    save_student(tmp_path, network, FLOW)
    load_weights(tmp_path, Network(), "sd3")
    content = bytearray((tmp_path / WEIGHTS).read_bytes())
    at = content.index(b"0.75") + 3 if part == "header" else len(content) - 1
    content[at] ^= 1  # sigma 0.74 instead of 0.75, or one weight
    (tmp_path / WEIGHTS).write_bytes(content)
    with refuses(OSError, str(tmp_path / WEIGHTS), "checksum", "copy it"):
        load_weights(tmp_path, Network(), "sd3")


def test_the_checksum_is_that_of_the_file_and_computed_without_reading_it_again(tmp_path, monkeypatch):
    weights = {"b": torch.randn(3, 2), "a": torch.ones(5).half(), "c": torch.randn(2, 3).T, "d": torch.tensor(7)}
    with monkeypatch.context() as patched:
        patched.delattr("hashlib.file_digest")
        save_weights(tmp_path / WEIGHTS, weights, FLOW.metadata())
    check_content(tmp_path / WEIGHTS)


def test_a_damaged_lora_is_refused_by_its_path(tmp_path):
    save_lora(tmp_path, adapter(), LORA)
    content = bytearray((tmp_path / ADAPTER).read_bytes())
    content[-1] ^= 1
    (tmp_path / ADAPTER).write_bytes(content)
    with refuses(OSError, str(tmp_path / ADAPTER), "checksum"):
        load_lora(tmp_path)


@pytest.mark.parametrize("checksum", ["", "0" * 64])
def test_a_checksum_of_a_stranger_is_not_believed(tmp_path, checksum):
    save_file({"0.weight": torch.zeros(2)}, tmp_path / WEIGHTS, metadata={CHECKSUM: checksum})
    with refuses(OSError, "checksum"):
        check_content(tmp_path / WEIGHTS)


def test_a_folder_without_weights_names_the_stage_that_makes_them(tmp_path, network):
    with refuses(MissingInputError, WEIGHTS) as error:
        load_weights(tmp_path, network, "sd3")
    assert error.value.stage == "train"


def test_full_weights_are_no_lora(tmp_path, network):
    save_weights(tmp_path / WEIGHTS, network.state_dict(), FLOW.metadata())
    with refuses(ValueError, "dpdmd.kind is 'full'"):
        load_lora(tmp_path)
