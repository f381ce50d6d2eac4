"""Writes one result file per benchmark: what was measured, where, when, with what."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
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

# Of the code that runs: read at the start, since others may commit meanwhile
_HEAD = ["git", "rev-parse", "--short", "HEAD"]
_COMMIT = subprocess.run(_HEAD, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def copy_project(folder: str) -> Path:
    """The project without results, where a benchmark cannot replace a user's own."""
    return shutil.copytree(ROOT, Path(folder) / "project", ignore=shutil.ignore_patterns(*_NOT_COPIED))


def machine() -> dict[str, object]:
    """Processor, cores and system of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    found = {"processor": names[0] if names else platform.processor(), "cores": os.cpu_count(), "threads": threads}
    torch = sys.modules.get("torch")  # a benchmark without it is not made to load it
    return found | ({"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {})


def record(name: str, measured: dict[str, object]) -> None:
    """Print the measurements and keep them in results/<name>.json."""
    about = {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers", "kedro", "dvc")},
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"measured": measured, **about}, indent=2) + "\n")
    for key, value in measured.items():
        print(f"{key:48} {value:.4g}" if isinstance(value, float) else f"{key:48} {value}")
