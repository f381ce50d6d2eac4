"""Options of the command line, through Kedro's own command and configuration, up to the check before the first node."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fuzz.verdicts import KNOWN, refusal, seeded, tolerant

from dpdmd_pipeline.cli import run as command
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.hooks import ConfigHooks
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS

PROJECT = Path(__file__).parents[2]
KIND = "options"
MAX_INTEGER = 10**12  # no option needs more; seeds have a bound of their own
# Values for an option of any type; most are of another type, or out of its range.
VALUES = [
    "-1", "0", "2", "0.5", "1e-300", "1e300", "1000000000000", "1" + "0" * 30, "1" * 5000, ".nan", ".inf", "-.inf",
    "null", "true", "no", "abc", "''", "a" * 10_000, "[1,2]", "[]", "{}", "{a: 1}", "${globals:folder}", "${nothing:x}",
    "!!python/object/apply:os.system [ls]", "*anchor", "&a b", "0x10", "1_000", "1:30", "2026-01-01", "💥", "\x1b[2J",
    "a\tb", "'", '"', "#", "=", "%", "@", "`", "- 1", "|", ">",
]  # fmt: skip
PATHS = ["", ".", "train.", ".train", "train..x", "nothing", "nothing.x", "train.nothing", "Train.max_steps", "train.0",
         "train.max_steps.x", "evaluate.by.0", "tráin.max_steps", "_merge", "<<", "train.<<"]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _project() -> None:
    """The pipelines' modules, loaded outside the time limit."""
    from kedro.framework.project import pipelines
    from kedro.framework.startup import bootstrap_project

    bootstrap_project(PROJECT)
    dict(pipelines)


def leaves(value: Any, path: str = "") -> list[str]:
    """Dotted names of all options outside lists."""
    if isinstance(value, dict) and value:
        return [leaf for key, inner in value.items() for leaf in leaves(inner, f"{path}.{key}" if path else key)]
    return [path]


# A study checks its runs' changes when it starts, with the options that they change.
CHANGES = re.compile(r"\.runs\.\w+\.(train|anchors)\b")
DEFAULTS = ConfigLoader(str(PROJECT / "conf"), "ci", **CONFIG_LOADER_ARGS)["parameters"]
OPTIONS = [option for option in leaves(DEFAULTS) if not CHANGES.search(option)]


def read(params: str) -> Any:
    """The parameters of a run with `--params`, checked by the hook that Kedro calls first."""
    options = command.make_context("run", ["--env", "ci", "--params", params]).params["params"]
    loader = ConfigLoader(str(PROJECT / "conf"), "ci", options, **CONFIG_LOADER_ARGS)
    try:
        ConfigHooks().after_context_created(SimpleNamespace(config_loader=loader, env="ci", params=None))
    except click.ClickException as error:  # an option of several forms has a line for each of them
        raise click.ClickException(re.sub(r"^\d+ things are wrong:\n|\n", "", error.message)) from error
    return loader["parameters"]


def accepted(params: str) -> tuple[Any, str]:
    """The parameters if they are accepted, and the refusal."""
    result: list[Any] = []
    line = refusal(KIND, lambda: result.append(read(params)))
    return (result[0] if result else None), line


def check(option: str, value: str) -> None:
    parameters, line = accepted(f"{option}={value}")
    if parameters is None:
        assert line
        return
    default = DEFAULTS
    for key in option.split("."):
        parameters, default = parameters[key], default[key]
    if isinstance(default, float) and isinstance(
        parameters, int
    ):  # a large number is a number; only counts have bounds
        parameters = float(parameters)
    assert not isinstance(parameters, float) or math.isfinite(parameters), f"accepted {option}={value}"
    assert not isinstance(parameters, int) or parameters < MAX_INTEGER or option.endswith("seed"), f"{option}={value}"
    assert not isinstance(parameters, str) or (len(parameters) < 1000 and parameters.isprintable()), f"{option}={value}"


@pytest.mark.parametrize("path", PATHS)
def test_names_of_no_option_are_refused(path):
    with tolerant(KIND, path):
        assert accepted(f"{path}=1")[1]


# An option that shows each known fault.
SHOWING = {
    "1000000000000": "anchors.seeds_per_prompt",
    "10000000000000000000": "anchors.seeds_per_prompt",
    "11111111111111111111": "train_dmd.ema",
    "aaaaaaaaaaaaaaaaaaaa": "study.baseline",
}


@pytest.mark.parametrize("damage", [damage for kind, damage in KNOWN if kind == KIND])
def test_a_known_fault_of_options_is_still_open(damage):
    (value,) = (value for value in VALUES if value[:20] == damage)
    with pytest.raises(AssertionError):
        check(SHOWING[damage], value)


def test_values_of_options_are_refused_or_within_bounds():
    @seeded(40)
    @given(st.sampled_from(OPTIONS), st.sampled_from(VALUES))
    def run(option, value):
        with tolerant(KIND, value[:20]):
            check(option, value)

    run()
