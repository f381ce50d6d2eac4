"""How long a user waits before anything happens: import, help, a refusal, the first stage."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import copy_project, record

KEDRO = [sys.executable, "-m", "kedro"]
REPEATS = 3


def seconds(command: list[str], cwd: Path, expected: int = 0) -> float:
    """Wall time of a command that must end with this exit code."""
    begun = time.perf_counter()
    found = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if found.returncode != expected:
        raise RuntimeError(f"{command} ended with {found.returncode}: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return time.perf_counter() - begun


def main() -> None:
    """Measure in a copy of the project without results."""
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_project(folder)
        cases = {
            "import dpdmd_pipeline": ([sys.executable, "-c", "import dpdmd_pipeline"], 0),
            "python alone": ([sys.executable, "-c", "pass"], 0),
            "kedro --help": ([*KEDRO, "--help"], 0),
            "refusal of a bad option": ([*KEDRO, "run", "--pipelines", "distill", "--params", "train.max_steps=-1"], 1),
        }
        measured = {
            f"{name}, seconds (median)": statistics.median(seconds(command, copy, code) for _ in range(REPEATS))
            for name, (command, code) in cases.items()
        }
        times = []
        for _ in range(REPEATS):
            shutil.rmtree(copy / "data/05_model_input", ignore_errors=True)
            times.append(seconds([*KEDRO, "run", "--pipelines", "prompts"], copy))
        measured["kedro run --pipelines prompts, seconds (median)"] = statistics.median(times)
    record("startup", measured)


if __name__ == "__main__":
    main()
