"""Headers of students: both readers, of the package and of the node pack, accept and refuse the same."""

import json
import struct

import pytest
import torch
from comfy_nodes.header import read_header
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from tests.fuzz.verdicts import KNOWN, refusal, seeded, tolerant

from dpdmd_pipeline.backbones.student_file import load_header, load_lora
from dpdmd_pipeline.backbones.student_header import StudentHeader

HEADERS = {
    "flow": StudentHeader("sd3", [1.0, 0.75, 0.5, 0.0], shift=3.0, resolution=1024, max_sequence_length=77),
    "renoise": StudentHeader("sana", [1.0, 0.5, 0.0], sampler="renoise"),
    "eps": StudentHeader("sdxl", prediction="eps", timesteps=[999, 749, 499, 249]),
    "lora": StudentHeader("sdxl", prediction="v", timesteps=[999, 1], kind="lora", lora_rank=2, lora_alpha=3.0),
}
# Spellings of a value that is no value of any key, with a name for each.
SPELLINGS = {
    "deep list": "[" * 50_000 + "]" * 50_000,
    "deep object": '{"a":' * 50_000 + "1" + "}" * 50_000,
    "long list": "[" + ",".join(map(str, range(10**6, -1, -1))) + "]",
    "word": "sd3" * 10**6,
    "digits": "1" * 5000,
    "large integer": "1" * 400,
    "infinity": "Infinity",
    "not a number": "NaN",
    "negative": "-1",
    "zero": "0",
    "list of lists": "[[1.0], [0.0]]",
    "list of words": '["1.0", "0.0"]',
    "rising": "[0.0, 0.5, 1.0]",
    "equal": "[1.0, 0.5, 0.5, 0.0]",
    "with NaN": "[1.0, NaN, 0.0]",
    "large first": "[1e300, 0.5, 0.0]",
    "true": "true",
    "list with true": "[true, false]",
    "empty": "",
    "empty list": "[]",
    "object": "{}",
    "terminal command": '"\x1b[2J"',
    "escaped half": r'"\ud800"',
    "cut": "[1.0, 0.5",
    "two values": "1.0 0.0",
    "line break": "euler\nrenoise",
}
LEVELS = ("sigmas", "timesteps")
NUMBERS = ("shift", "lora_rank", "lora_alpha", "guidance")
WORDS = ("prediction", "sampler", "kind", "format")
READERS = PACKAGE, PACK = ("headers, package", "headers, node pack")


def sound(name: str) -> dict[str, str]:
    return HEADERS[name].metadata()


def read(reader: str, folder, metadata: dict[str, str]) -> str:
    """The refusal by one reader."""
    path = folder / "student.safetensors"
    if reader == PACK:
        return refusal(PACK, lambda: read_header(metadata, path.name), ValueError)
    path.write_bytes(save({"weight": torch.zeros(1)}, metadata))
    return refusal(PACKAGE, lambda: load_header(path))


@pytest.mark.parametrize("name", HEADERS)
def test_sound_headers_are_accepted(tmp_path, name):
    assert [read(reader, tmp_path, sound(name)) for reader in READERS] == ["", ""]


def damaged_keys(name: str) -> list[str]:
    """Keys of a header that both readers need."""
    return [key for key in (*LEVELS, *NUMBERS, *WORDS) if f"dpdmd.{key}" in sound(name)]


CASES = [(name, key, spelling) for name in HEADERS for key in damaged_keys(name) for spelling in SPELLINGS]


def check(reader: str, folder, name: str, key: str, spelling: str) -> None:
    line = read(reader, folder, sound(name) | {f"dpdmd.{key}": SPELLINGS[spelling]})
    assert key in line, f"accepted dpdmd.{key} = {SPELLINGS[spelling][:60]!r} of {name}"


@pytest.mark.parametrize("reader", READERS)
def test_damaged_headers_are_refused(tmp_path_factory, reader):
    folder = tmp_path_factory.mktemp("headers")

    @seeded(100)
    @given(st.sampled_from(CASES))
    def run(case):
        with tolerant(reader, case[2]):
            check(reader, folder, *case)

    run()


@pytest.mark.parametrize("spelling", [damage for kind, damage in KNOWN if kind == PACKAGE])
def test_a_known_fault_of_headers_is_still_open(tmp_path, spelling):
    with pytest.raises((AssertionError, ArithmeticError, RecursionError)):
        for case in CASES:
            if case[2] == spelling:
                check(PACKAGE, tmp_path, *case)


@pytest.mark.parametrize("reader", READERS)
def test_headers_without_a_needed_key_are_refused(tmp_path, reader):
    for name in HEADERS:
        for key in ("format", "prediction", "sampler", "family"):
            metadata = {other: value for other, value in sound(name).items() if other != f"dpdmd.{key}"}
            assert key in read(reader, tmp_path, metadata)


FILES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no length": lambda content: content[:7],
    "long length": lambda content: struct.pack("<Q", 2**63) + content[8:],
    "length beyond the file": lambda content: struct.pack("<Q", len(content)) + content[8:],
    "deep JSON": lambda content: struct.pack("<Q", 100_000) + b"[" * 50_000 + b"]" * 50_000,
    "deep metadata": lambda content: header_bytes({"__metadata__": {"dpdmd.format": deep()}}),
    "number as metadata": lambda content: header_bytes({"__metadata__": {"dpdmd.format": 1}}),
    "list as metadata": lambda content: header_bytes({"__metadata__": ["dpdmd.format"]}),
    "tensor outside": lambda content: header_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "large shape": lambda content: header_bytes({"a": {"dtype": "F32", "shape": [2**62, 8], "data_offsets": [0, 0]}}),
    "unknown type": lambda content: header_bytes({"a": {"dtype": "X9", "shape": [], "data_offsets": [0, 0]}}),
    "pickle": lambda content: b"\x80\x04\x95" + content,
    "zip": lambda content: b"PK\x03\x04" + content,
    "web page": lambda content: b"<!doctype html><title>404</title>",
}


def deep() -> list:
    inner: list = []
    for _ in range(400):
        inner = [inner]
    return inner


def header_bytes(header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


@pytest.mark.parametrize("damage", FILES)
@pytest.mark.parametrize("load", [load_header, load_lora])
def test_files_that_are_no_safetensors_are_refused(tmp_path, damage, load):
    path = tmp_path / "student.safetensors"
    path.write_bytes(FILES[damage](save({"weight": torch.zeros(1)}, sound("flow"))))
    assert path.name in refusal("headers, file", lambda: load(path))


def test_random_bytes_in_a_student_are_read_or_refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("headers")
    content = save({"weight": torch.zeros(1)}, sound("lora"))

    @seeded(60)
    @given(st.binary(min_size=1, max_size=4), st.integers(0, len(content) - 1))
    def run(noise, position):
        path = folder / "student.safetensors"
        path.write_bytes(content[:position] + noise + content[position + len(noise) :])
        refusal("headers, file", lambda: load_header(path))

    run()
