"""Kills anchors and training of the default run at random moments; the result must equal that of an unbroken run.

    python benchmarks/kill_and_resume.py [kills of each stage]

It takes about twice the time of the default run. The moments are random in each run and are recorded.
"""

from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from commands import KEDRO, copy_project, environment
from record import record

OUTPUTS = {
    "anchors": ("data/05_model_input/anchors",),
    "train": ("data/06_models/student", "data/06_models/student_dmd"),
}
STARTING = 15  # seconds in which a stage only loads


def start(project: Path, stage: str) -> subprocess.Popen:
    """Start one stage as a user does."""
    command = [*KEDRO, "run", "--env", "base", "--pipelines", stage]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=project, env=environment(), **quiet)


def finish(project: Path, stage: str) -> float:
    """Run a stage to its end; returns the seconds."""
    begin = time.perf_counter()
    if start(project, stage).wait():
        raise SystemExit(f"Error: `kedro run --pipelines {stage}` failed in {project}; see logs/ there")
    return time.perf_counter() - begin


def kill_once(project: Path, stage: str, after: float) -> bool:
    """Start a stage and kill it after so many seconds; True if it was still running then."""
    process = start(project, stage)
    try:
        process.wait(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def kill_often(project: Path, stage: str, kills: int, seconds: float) -> list[float]:
    """Kill a stage of so many seconds at random moments; returns the moments, in seconds after each start."""
    moments: list[float] = []
    while len(moments) < kills:
        moment = random.uniform(STARTING, STARTING + seconds / kills)
        if not kill_once(project, stage, moment):
            break
        moments.append(moment)
    return moments


def digest(project: Path, stage: str) -> str:
    """SHA-256 of a stage's results."""
    sha = hashlib.sha256()
    for folder in OUTPUTS[stage]:
        for path in sorted(path for path in (project / folder).rglob("*") if path.is_file()):
            sha.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes())
    return sha.hexdigest()


def main(kills: int) -> None:
    """Compare an unbroken run and a killed one, stage by stage."""
    measured: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        unbroken, killed = copy_project(first), copy_project(second)
        for project in (unbroken, killed):
            finish(project, "prompts")
        for stage in OUTPUTS:
            seconds = finish(unbroken, stage)
            moments = kill_often(killed, stage, kills, seconds)
            finish(killed, stage)
            same = digest(unbroken, stage) == digest(killed, stage)
            measured |= {
                f"{stage}: seconds left alone": seconds,
                f"{stage}: killed after seconds": [round(moment, 1) for moment in moments],
                f"{stage}: bit-identical": same,
            }
            if not same:
                raise SystemExit(f"Error: {stage} differs from the unbroken run: {measured}")
    record("kill_and_resume", measured)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
