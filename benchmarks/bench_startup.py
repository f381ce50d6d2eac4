"""Waiting times of a user: import, help, an error message, the first stage."""

import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from commands import KEDRO, copy_project, run
from record import record

REPEATS = 3


def seconds(command: list[str], cwd: Path, exit_code: int = 0) -> float:
    """Wall time of a command that must end with this exit code."""
    start = time.perf_counter()
    run(command, cwd, exit_code)
    return time.perf_counter() - start


def main() -> None:
    """Measure in a copy of the project without results."""
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(folder)
        cases = {
            "import dpdmd_pipeline": ([sys.executable, "-c", "import dpdmd_pipeline"], 0),
            "python alone": ([sys.executable, "-c", "pass"], 0),
            "kedro --help": ([*KEDRO, "--help"], 0),
            "refusal of a bad option": ([*KEDRO, "run", "--pipelines", "distill", "--params", "train.max_steps=-1"], 1),
        }
        measured = {
            f"{name}, seconds (median)": statistics.median(seconds(command, project, code) for _ in range(REPEATS))
            for name, (command, code) in cases.items()
        }
        times = []
        for _ in range(REPEATS):
            shutil.rmtree(project / "data/05_model_input", ignore_errors=True)
            times.append(seconds([*KEDRO, "run", "--pipelines", "prompts"], project))
        measured["kedro run --pipelines prompts, seconds (median)"] = statistics.median(times)
    record("startup", measured)


if __name__ == "__main__":
    main()
