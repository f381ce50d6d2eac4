"""Kills anchors and training of the default run at random moments; the result must be that of a run left alone.

    python benchmarks/kill_and_resume.py [kills of each stage]

Takes about twice the time of the default run; its moments are drawn anew each time and told.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import copy_project, record

OUTPUTS = {
    "anchors": ("data/05_model_input/anchors",),
    "train": ("data/06_models/student", "data/06_models/student_dmd"),
}
STARTING = 15  # seconds in which a stage only loads


def start(project: Path, stage: str) -> subprocess.Popen:
    """One stage as its user starts it."""
    command = [sys.executable, "-m", "kedro", "run", "--env", "base", "--pipelines", stage]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=project, env=os.environ | {"DO_NOT_TRACK": "1"}, **quiet)


def finish(project: Path, stage: str) -> float:
    """Run a stage to its end; the seconds it took."""
    begun = time.perf_counter()
    if start(project, stage).wait():
        raise SystemExit(f"Error: `kedro run --pipelines {stage}` failed in {project}; see logs/ there")
    return time.perf_counter() - begun


def kill_once(project: Path, stage: str, after: float) -> bool:
    """Start a stage and kill it; whether it was still running then."""
    running = start(project, stage)
    try:
        running.wait(timeout=after)
        return False
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGKILL)
        running.wait()
        return True


def digest(project: Path, stage: str) -> str:
    """SHA-256 of a stage's results."""
    found = hashlib.sha256()
    for folder in OUTPUTS[stage]:
        for path in sorted(path for path in (project / folder).rglob("*") if path.is_file()):
            found.update(f"{path.relative_to(project)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def main(kills: int) -> None:
    measured: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as left_alone, tempfile.TemporaryDirectory() as broken:
        whole, killed = copy_project(left_alone), copy_project(broken)
        for project in (whole, killed):
            finish(project, "prompts")
        for stage in OUTPUTS:
            seconds = finish(whole, stage)
            moments, landed = [], 0
            while landed < kills:
                moments.append(random.uniform(STARTING, STARTING + seconds / kills))
                landed += kill_once(killed, stage, moments[-1])
                if len(moments) > landed:  # it ended before its kill
                    break
            finish(killed, stage)
            same = digest(whole, stage) == digest(killed, stage)
            measured |= {
                f"{stage}: seconds left alone": seconds,
                f"{stage}: killed after seconds": [round(moment, 1) for moment in moments[:landed]],
                f"{stage}: bit-identical": same,
            }
            if not same:
                raise SystemExit(f"Error: {stage} differs from the run left alone: {measured}")
    record("kill_and_resume", measured)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
