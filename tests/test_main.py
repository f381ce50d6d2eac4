"""`python -m dpdmd_pipeline`: its commands, and the refusal of other words."""

import importlib
import subprocess
import sys

import pytest

from dpdmd_pipeline.__main__ import main
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
    for name, purpose in COMMANDS.items():
        (line,) = (line for line in result.stdout.splitlines() if line.split()[:1] == [name])
        assert line.endswith(purpose)


@pytest.mark.parametrize(
    ("name", "near"),
    [("comfy_install", "comfy-install"), ("scores", "score"), ("run", ""), ("zzz", "")],
)
def test_another_word_is_refused_with_the_most_similar_command(monkeypatch, name, near):
    monkeypatch.setattr(sys, "argv", ["dpdmd-pipeline", name, "x"])
    with pytest.raises(SystemExit) as refused:
        main()
    message = refused.value.code  # Python prints it to stderr and exits with 1
    assert repr(name) in message and (repr(near) in message) == bool(near)
    assert all(command in message for command in COMMANDS) and "kedro run" in message and "\n" not in message
