"""Result files: one per benchmark, with its measurements, the date, the commit, the machine and the versions."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = Path(os.environ.get("BENCHMARK_RESULTS", Path(__file__).parent / "results"))

# Read at the start: another commit may follow while the benchmark runs
_HEAD = ["git", "rev-parse", "--short", "HEAD"]
_COMMIT = subprocess.run(_HEAD, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def machine() -> dict[str, object]:
    """Processor, cores, threads and GPU of this machine."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    info = {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }
    torch = sys.modules.get("torch")  # do not load it for a benchmark without it
    return info | ({"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {})


def record(name: str, measured: dict[str, object]) -> None:
    """Print the measurements and write them to results/<name>.json, or into the folder $BENCHMARK_RESULTS."""
    about = {
        "date": date.today().isoformat(),
        "commit": _COMMIT,
        "machine": machine(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in ("torch", "diffusers", "transformers", "kedro", "dvc")},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"measured": measured, **about}, indent=2) + "\n")
    for key, value in measured.items():
        print(f"{key:48} {value:.4g}" if isinstance(value, float) else f"{key:48} {value}")
