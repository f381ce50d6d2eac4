"""Imports stay light, and layers import only the layers below them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.test_params_typed import PIPELINES

PROJECT = Path(__file__).parents[1]
HEAVY = {"torch", "diffusers", "transformers"}


def run(code: str, timeout: float = 60) -> str:
    """Output of a fresh interpreter."""
    environment = os.environ | {"DO_NOT_TRACK": "1"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def loaded_after(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter, at its exit."""
    report = "import atexit, sys; atexit.register(lambda: print('LOADED', *{m.split('.')[0] for m in sys.modules}))\n"
    return set(run(report + code).split("LOADED ")[1].split())


@pytest.fixture(scope="module")
def loaded_by_stage() -> dict[str, set[str]]:
    """Top-level modules after each stage is wired, in one interpreter; `report`, the lightest, is the first."""
    code = f"""
import importlib, json, sys
loaded = {{}}
for stage in {sorted(PIPELINES, key=lambda stage: stage != "report")}:
    importlib.import_module(f"dpdmd_pipeline.pipelines.{{stage}}").create_pipeline()
    loaded[stage] = sorted({{name.split(".")[0] for name in sys.modules}})
print("LOADED", json.dumps(loaded))
"""
    return {stage: set(names) for stage, names in json.loads(run(code).split("LOADED ")[1]).items()}


def test_importing_the_package_loads_no_large_library():
    assert not loaded_after("import dpdmd_pipeline") & (HEAVY | {"kedro", "numpy", "pandas", "pydantic"})


def test_kedro_help_loads_no_torch_diffusers_or_transformers():
    code = "import sys; sys.argv = ['kedro', '--help']; from kedro.framework.cli import main; main()"
    assert not loaded_after(code) & HEAVY


@pytest.mark.parametrize("stage", PIPELINES)
def test_a_stage_is_wired_without_diffusers_or_transformers(stage, loaded_by_stage):
    assert not loaded_by_stage[stage] & {"diffusers", "transformers", "accelerate"}


def test_the_report_is_wired_without_torch_or_its_own_libraries(loaded_by_stage):
    assert next(iter(loaded_by_stage)) == "report"
    assert not loaded_by_stage["report"] & {"torch", "diffusers", "transformers", "jinja2", "PIL"}


def test_the_import_contracts_hold():
    run("import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))", timeout=120)
