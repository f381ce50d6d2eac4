"""What is loaded when, and who may import whom."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_params_typed import PIPELINES

PROJECT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "transformers"}


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter, at its exit."""
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *{m.split('.')[0] for m in sys.modules}))\n"
    environment = os.environ | {"DO_NOT_TRACK": "1"}
    command = [sys.executable, "-c", report + code]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    return set(result.stdout.split("LOADED ")[1].split())


def test_importing_the_package_loads_nothing_of_weight():
    assert not loaded_after("import dpdmd_pipeline") & (HEAVY | {"kedro", "numpy", "pandas", "pydantic"})


def test_asking_kedro_for_help_loads_no_torch_diffusers_or_transformers():
    code = "import sys; sys.argv = ['kedro', '--help']; from kedro.framework.cli import main; main()"
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize("stage", PIPELINES)
def test_a_stage_is_wired_without_diffusers_or_transformers(stage):
    code = f"from dpdmd_pipeline.pipelines import {stage}; {stage}.create_pipeline()"
    assert not loaded_after(code) & {"diffusers", "transformers", "accelerate"}


def test_the_doors_hold():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
