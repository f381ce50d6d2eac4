"""The embedded world on this machine's device, against the committed numbers, which are a CPU's.

python benchmarks/gpu_world.py line     # the default run: teacher, DMD and DP-DMD
python benchmarks/gpu_world.py study    # DMD and DP-DMD on further training seeds
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch  # noqa: F401  # so that the result file names the GPU
import yaml

from commands import KEDRO, copy_project, run
from record import ROOT, record

RUNS = ("dmd", "dp_dmd")
SEEDS = [3, 4, 5, 6, 7]  # the committed study has 0, 1 and 2


def main(part: str, env: str, seeds: list[int]) -> None:
    """Run one part in a copy of the project, and record it beside the committed numbers."""
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(folder)
        if part == "study":
            _keep_runs(project, seeds)
            run([*KEDRO, "run", "--env", env, "--pipelines", "prompts,anchors"], project)
        start = time.perf_counter()
        run([*KEDRO, "run", "--env", env, "--pipelines", {"line": "distill"}.get(part, part)], project)
        seconds = time.perf_counter() - start
        here = _numbers(project, part, env)
    committed = _numbers(ROOT, part, "base")
    record(f"world_{part}", {"seconds": seconds, "environment": env, "here": here, "committed, from a CPU": committed})


def _keep_runs(project: Path, seeds: list[int]) -> None:
    """Leave the runs that the headline number needs in the study, on other seeds."""
    path = project / "conf/base/parameters_study.yml"
    options = yaml.safe_load(path.read_text())
    runs = {name: options["study"]["runs"][name] for name in RUNS}
    path.write_text(yaml.safe_dump({"study": options["study"] | {"runs": runs, "seeds": seeds}}))
    for parameters in (project / "conf").glob("*/parameters.yml"):  # ci names runs of its own
        options = yaml.safe_load(parameters.read_text())
        options.pop("study", None)
        parameters.write_text(yaml.safe_dump(options))


def _numbers(project: Path, part: str, env: str) -> dict[str, Any]:
    """The run's summary, or the study's table: values of each seed."""
    from dpdmd_pipeline.pipelines.study.nodes import summarise

    folder = project / "data/08_reporting" / ("" if env == "base" else env)
    if part == "line":
        return json.loads((folder / "summary.json").read_text())
    table = summarise(json.loads((folder / "study.json").read_text()))
    return {name: table[name] for name in RUNS}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=["line", "study"])
    parser.add_argument("--env", choices=["base", "ci"], default="base", help="ci: quick, its numbers mean nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="training seeds of the study")
    arguments = parser.parse_args()
    main(arguments.part, arguments.env, arguments.seeds)
