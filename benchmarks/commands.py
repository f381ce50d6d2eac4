"""Commands in a copy of the project, run as a user runs them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from record import ROOT

KEDRO = [sys.executable, "-m", "kedro"]
_NOT_COPIED = (
    ".git",
    ".venv",
    ".dvc",
    "03_primary",
    "05_model_input",
    "07_model_output",
    "student",
    "student_dmd",
    ".train_state",
)


def copy_project(folder: str) -> Path:
    """Copy the project without results, so that a benchmark cannot overwrite a user's own."""
    return shutil.copytree(ROOT, Path(folder) / "project", ignore=shutil.ignore_patterns(*_NOT_COPIED))


def environment() -> dict[str, str]:
    """This process's environment, without telemetry."""
    return os.environ | {"DO_NOT_TRACK": "1"}


def run(command: list[str], cwd: Path | None = None, exit_code: int = 0) -> str:
    """Run a command and return its output.

    Raises:
        RuntimeError: with both outputs, if it ends with another exit code.
    """
    process = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    if process.returncode != exit_code:
        output = process.stdout[-2000:] + process.stderr[-2000:]
        raise RuntimeError(f"{command} ended with {process.returncode} in {cwd or Path.cwd()}: {output}")
    return process.stdout
