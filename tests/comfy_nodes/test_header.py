"""Headers of student files: the package's are read, impossible ones are refused by the name of their field."""

import json

import pytest
from comfy_nodes.header import StudentHeader, read_header
from comfy_nodes.limits import LimitError
from tests.raising import refuses

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


def test_the_header_of_the_first_files_is_still_read():
    first = {key: value for key, value in FLOW.items() if key not in ("dpdmd.kind", "dpdmd.shift")}
    header = read_header(first, "student")
    assert header.kind == "full" and header.shift is None


def test_headers_of_both_kinds_of_model_are_read():
    assert read_header(FLOW, "x") == StudentHeader(
        "sd3", "full", "flow", "euler", sigmas=(1.0, 0.75, 0.5, 0.25, 0.0), shift=3.0
    )
    assert read_header(EPS, "x") == StudentHeader(
        "sdxl", "lora", "eps", "renoise", timesteps=(999, 749, 499, 249), lora_rank=64, lora_alpha=128.0
    )


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt", "modelspec.title": "another model"}])
def test_files_of_other_tools_have_no_header(metadata):
    assert read_header(metadata, "x") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dpdmd.format": "2"}, r"x: dpdmd.format .*'2'.*'1'"),
        ({"dpdmd.format": None}, r"dpdmd.format .*None"),
        ({"dpdmd.family": None}, r"x: dpdmd.family .*None"),
        ({"dpdmd.kind": "partial"}, r"dpdmd.kind .*'partial'.* full, lora"),
        ({"dpdmd.prediction": "x0"}, r"dpdmd.prediction .*'x0'.* flow, eps, v"),
        ({"dpdmd.sampler": "heun"}, r"dpdmd.sampler .*'heun'.* euler, renoise"),
        ({"dpdmd.guidance": "3.5"}, r"dpdmd.guidance .*3.5.* 1.0"),
        ({"dpdmd.sigmas": None}, r"dpdmd.sigmas .*None"),
        ({"dpdmd.sigmas": "[1, 0.5"}, r"dpdmd.sigmas .*'\[1, 0.5'"),
        ({"dpdmd.sigmas": '[1, "a", 0]'}, r"dpdmd.sigmas .*\[1, \"a\", 0\]"),
        ({"dpdmd.sigmas": "[1, 0.5, 0.6, 0]"}, r"dpdmd.sigmas .*\[1, 0.5, 0.6, 0\]"),
        ({"dpdmd.sigmas": "[1, 0.5]"}, r"dpdmd.sigmas .*\[1, 0.5\]"),
        ({"dpdmd.sigmas": "[2, 1, 0]"}, r"dpdmd.sigmas .*\[2, 1, 0\]"),
        ({"dpdmd.sigmas": "[1, NaN, 0]"}, r"dpdmd.sigmas .*NaN"),
        ({"dpdmd.shift": "-1"}, r"dpdmd.shift .*'-1'"),
        ({"dpdmd.prediction": "v"}, r"dpdmd.timesteps .*None"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[1, 2]"}, r"dpdmd.timesteps .*\[1, 2\]"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[9.5, 2]"}, r"dpdmd.timesteps .*\[9.5, 2\]"),
        ({"dpdmd.prediction": "v", "dpdmd.timesteps": "[]"}, r"dpdmd.timesteps .*\[\]"),
    ],
)
def test_an_impossible_header_is_refused(change, message):
    changed = {key: value for key, value in (FLOW | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        read_header(changed, "x")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sigmas", "[" * 20_000 + "]" * 20_000),
        ("sigmas", '{"a":' * 20_000 + "1" + "}" * 20_000),
        ("sigmas", "[" + ",".join(map(str, range(10**6, -1, -1))) + "]"),
        ("timesteps", "[" + ",".join(map(str, range(2000, -1, -1))) + "]"),
        ("shift", "1" * 10**6),
        ("family", "sd3" * 10**6),
        ("sampler", "euler" * 10**6),
    ],
    ids=lambda value: value[:12],
)
def test_a_value_beyond_the_limits_is_refused_in_one_short_line(key, value):
    fields = EPS if key == "timesteps" else FLOW
    with refuses(LimitError, "x: ", f"dpdmd.{key}") as error:
        read_header(fields | {f"dpdmd.{key}": value}, "x")
    assert len(str(error.value)) < 200 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "1" * 10**6),
        ("sigmas", "[" + "1" * 400 + ", 0]"),
        ("sigmas", "[" + "1" * 5000 + ", 0]"),
        ("sigmas", "1, 0.5 \n" * 1000),
        ("shift", "1" + "0" * 400),
        ("timesteps", "[" + "9" * 400 + ", 0]"),
    ],
    ids=lambda value: value[:12],
)
def test_a_number_that_no_float_holds_and_a_long_value_are_refused_in_one_short_line(key, value):
    fields = EPS if key == "timesteps" else FLOW
    with refuses(ValueError, "x: ", f"dpdmd.{key}", f"({len(value)} characters)") as error:
        read_header(fields | {f"dpdmd.{key}": value}, "x")
    assert len(str(error.value)) < 450 and "\n" not in str(error.value)


def test_a_schedule_of_a_thousand_steps_is_read():
    sigmas = [1 - index / 1000 for index in range(1001)]
    assert read_header(FLOW | {"dpdmd.sigmas": json.dumps(sigmas)}, "x").sigmas == tuple(sigmas)


def test_the_packs_header_has_the_field_names_of_the_packages():
    from dpdmd_pipeline.backbones import student_file

    written = student_file.StudentHeader(family="sd3", sigmas=[1.0, 0.5, 0.0]).metadata()
    header = read_header(written, "x")
    assert json.loads(written["dpdmd.sigmas"]) == list(header.sigmas)
    assert vars(header).keys() <= student_file.StudentHeader.__dataclass_fields__.keys()
