"""Overhead of `kedro run` over direct calls of the library: stages prompts, anchors and train, to the same files.

Each run is its own process in a copy of the project. Both ways alternate and must end with the same student.

    python benchmarks/bench_line.py
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from commands import KEDRO, copy_project, run
from record import record

# Short runs of the real options; `ci` would train for moments only
_TRAINING = {"max_steps": 3, "batch_size": 16}
CHANGES = {"anchors": {"seeds_per_prompt": 2}, "train": _TRAINING, "train_dmd": _TRAINING}
ALLOWED = "2 seconds and 1 %"
_OUTPUTS = ("03_primary", "05_model_input", "06_models/student", "06_models/student_dmd", "06_models/.train_state")


def main(repeats: int) -> None:
    """Run both ways in turn."""
    runs: dict[str, list[dict[str, float]]] = {"kedro run": [], "library": []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(folder)
        params = [f"{group}.{name}={value}" for group, values in CHANGES.items() for name, value in values.items()]
        pipelines = ["--env", "base", "--pipelines", "prompts,anchors,train"]
        commands = {
            "kedro run": [*KEDRO, "run", *pipelines, "--params", ",".join(params)],
            "library": [sys.executable, str(Path(__file__).resolve()), "--library", str(project)],
        }
        for _ in range(repeats):
            students = set()
            for name, command in commands.items():
                runs[name].append(_run(command, project))
                students.add(_digest(project))
            if len(students) > 1:
                raise RuntimeError("both ways must end with the same student, but these differ")
    record("line", _result(runs) | {"load average before": load, "student": "the same, to the last bit"})


def _result(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for clock, words in {"wall": "by the wall", "cpu": "of processor time"}.items():
        kedro, library = ([one[clock] for one in runs[name]] for name in ("kedro run", "library"))
        over = statistics.median(k - p for k, p in zip(kedro, library, strict=True))
        allowed = 2 + 0.01 * statistics.median(library)
        result |= {
            f"kedro run, seconds {words} (median)": statistics.median(kedro),
            f"library, seconds {words} (median)": statistics.median(library),
            f"overhead, seconds {words} (median of differences)": over,
            f"{ALLOWED} of the library's, {words}": allowed,
        }
    return result | {"runs": runs}


def _run(command: list[str], project: Path) -> dict[str, float]:
    """Seconds of one run without earlier outputs; processor time is that of child processes."""
    for name in _OUTPUTS:
        shutil.rmtree(project / "data" / name, ignore_errors=True)
    (project / "data/03_primary").mkdir()
    cpu, wall = _children_cpu(), time.perf_counter()
    run(command, project)
    return {"wall": time.perf_counter() - wall, "cpu": _children_cpu() - cpu}


def _children_cpu() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _digest(project: Path) -> str:
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted((project / "data/06_models/student").glob("*.safetensors")))
    ).hexdigest()


def by_library(project: Path) -> None:
    """Run the same three stages without Kedro's session, catalog and hooks, to the same files."""
    from dpdmd_pipeline.backbones.options import BackboneOptions
    from dpdmd_pipeline.pipelines.train.nodes import draw_curves, train_student
    from dpdmd_pipeline.training.options import TrainOptions

    data, parameters, histories = project / "data", _parameters(project), {}
    backbone = BackboneOptions(**parameters["backbone"])
    *inputs, anchor_recipe = _prepare(project, parameters, backbone)
    for group, name in (("train_dmd", "student_dmd"), ("train", "student")):
        options = TrainOptions(**parameters[group])
        write, history = train_student(*inputs, data / "06_models/.train_state", None, backbone, anchor_recipe, options)
        _save_and_load("model_folder.ModelFolderDataset", data / "06_models" / name, write)
        (data / f"08_reporting/{name}_history.json").write_text(json.dumps(history))
        histories[name] = history
    draw_curves(histories["student"], histories["student_dmd"]).savefig(data / "08_reporting/train_curve.png")


def _prepare(project: Path, parameters: dict[str, dict], backbone: Any) -> tuple[Any, ...]:
    """Prompts, embeddings, anchors, the teacher's folder and the anchors' recipe."""
    from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
    from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
    from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts
    from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
    from dpdmd_pipeline.training.options import TrainOptions
    from dpdmd_pipeline.training.recipe import AnchorRecipe

    data, teacher = project / "data", project / "data/06_models/shapes_teacher"
    stage = PromptsOptions(**parameters["prompts"])
    files = ("prompts.txt", "prompts_eval.txt")
    raw = [PromptFileDataset(filepath=str(data / "01_raw" / name)).load() for name in files]
    cleaned, report = clean_prompts(*raw, stage)
    (data / "08_reporting/prompts_report.json").write_text(json.dumps(report))
    prompts = _save_and_load("prompt_file.PromptFileDataset", data / "03_primary/prompts.jsonl", cleaned)
    shards = encode_prompts(prompts, teacher, backbone, stage)
    embeddings = _save_and_load("sharded.ShardedDataset", data / "05_model_input/embeddings", shards)
    recipe = AnchorRecipe(**parameters["anchors"])
    shards = make_anchors(prompts, embeddings, teacher, backbone, recipe, TrainOptions(**parameters["train"]))
    anchors = _save_and_load("sharded.ShardedDataset", data / "05_model_input/anchors", shards)
    return prompts, embeddings, anchors, teacher, recipe


def _parameters(project: Path) -> dict[str, dict[str, Any]]:
    """All groups of conf/base with this benchmark's changes."""
    from dpdmd_pipeline.configuration import ConfigLoader

    loader = ConfigLoader(str(project / "conf"), base_env="base", default_run_env="base")
    return {group: options | CHANGES.get(group, {}) for group, options in loader["parameters"].items()}


def _save_and_load(kind: str, path: Path, data: Any) -> Any:
    """Save with a dataset of the package, and load for the next stage."""
    module, name = kind.split(".")
    dataset = getattr(importlib.import_module(f"dpdmd_pipeline.datasets.{module}"), name)(filepath=str(path))
    dataset.save(data)
    return dataset.load()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, help="internal: run by the library, in this copy of the project")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.library:
        by_library(args.library)
    else:
        main(args.repeats)
