"""`python -m dpdmd_pipeline`: which commands there are, and what is said of those that are not."""

import importlib
import subprocess
import sys

import pytest

from dpdmd_pipeline.commands import COMMANDS


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dpdmd_pipeline", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_with_a_main(name):
    assert callable(importlib.import_module(f"dpdmd_pipeline.commands.{name.replace('-', '_')}").main)


def test_the_help_lists_kedros_options_and_the_commands():
    result = run("--help")
    assert result.returncode == 0 and "--pipelines" in result.stdout
    for name, does in COMMANDS.items():
        (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert line.endswith(does)


@pytest.mark.parametrize(
    "name, near",
    [("comfy_install", "comfy-install"), ("scores", "score"), ("run", None), ("zzz", None)],
)
def test_a_word_that_is_no_command_is_refused_with_the_nearest(name, near):
    result = run(name, "x")
    assert result.returncode == 1 and result.stdout == ""
    meant = f"did you mean {near!r}? " if near else ""
    assert result.stderr.strip() == (
        f"Error: no command {name!r}: {meant}there are arena, comfy-install, score; "
        "options alone are those of `kedro run`"
    )
