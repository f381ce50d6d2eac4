"""What `kedro run` costs over calling the library: the stages prompts, anchors and train, to the same files.

Each run is a process of its own in a copy of the project; both ways take turns, and end with the same student.

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
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import copy_project, record

# Short runs of the real options; `ci` would train for moments only
_TRAINING = {"max_steps": 3, "batch_size": 16}
CHANGES = {"anchors": {"seeds_per_prompt": 2}, "train": _TRAINING, "train_dmd": _TRAINING}
ALLOWED = "2 seconds and 1 %"
_MADE = ("03_primary", "05_model_input", "06_models/student", "06_models/student_dmd", "06_models/.train_state")


def main(repeats: int) -> None:
    """Both ways in turn."""
    taken: dict[str, list[dict[str, float]]] = {"kedro run": [], "library": []}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        project = copy_project(folder)
        params = [f"{group}.{name}={value}" for group, values in CHANGES.items() for name, value in values.items()]
        line = ["-m", "kedro", "run", "--env", "base", "--pipelines", "prompts,anchors,train"]
        commands = {
            "kedro run": [sys.executable, *line, "--params", ",".join(params)],
            "library": [sys.executable, str(Path(__file__).resolve()), "--library", str(project)],
        }
        for _ in range(repeats):
            students = set()
            for name, command in commands.items():
                taken[name].append(_run(command, project))
                students.add(_digest(project))
            if len(students) > 1:
                raise RuntimeError("the two ways end with other students: they did not do the same work")
    record("line", _told(taken) | {"load average before": load, "student": "the same, to the last bit"})


def _told(taken: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for clock, words in {"wall": "by the wall", "cpu": "of processor time"}.items():
        kedro, library = ([run[clock] for run in taken[name]] for name in ("kedro run", "library"))
        over = statistics.median(k - p for k, p in zip(kedro, library, strict=True))
        allowed = 2 + 0.01 * statistics.median(library)
        found |= {
            f"kedro run, seconds {words} (median)": statistics.median(kedro),
            f"library, seconds {words} (median)": statistics.median(library),
            f"overhead, seconds {words} (median of differences)": over,
            f"{ALLOWED} of the library's, {words}": allowed,
        }
    return found | {"runs": taken}


def _run(command: list[str], project: Path) -> dict[str, float]:
    """Seconds of one run from nothing, of this process's children alone."""
    for name in _MADE:
        shutil.rmtree(project / "data" / name, ignore_errors=True)
    (project / "data/03_primary").mkdir()
    cpu, begun = _children(), time.perf_counter()
    found = subprocess.run(command, cwd=project, capture_output=True, text=True)
    if found.returncode:
        raise RuntimeError(f"{command} ended with {found.returncode}: {found.stdout[-2000:]}{found.stderr[-2000:]}")
    return {"wall": time.perf_counter() - begun, "cpu": _children() - cpu}


def _children() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _digest(project: Path) -> str:
    return hashlib.sha256(
        b"".join(path.read_bytes() for path in sorted((project / "data/06_models/student").glob("*.safetensors")))
    ).hexdigest()


def by_library(project: Path) -> None:
    """The same three stages without Kedro's session, catalog and hooks, to the same places."""
    from dpdmd_pipeline.backbones.options import BackboneOptions
    from dpdmd_pipeline.pipelines.train.nodes import draw_curves, train_student
    from dpdmd_pipeline.training.options import TrainOptions

    data, histories = project / "data", {}
    backbone = BackboneOptions(**_options(project, "backbone", "backbone"))
    made = _prepared(project, backbone)
    for group, name in (("train_dmd", "student_dmd"), ("train", "student")):
        run = TrainOptions(**_options(project, group, "train"))
        write, history = train_student(*made[:-1], data / "06_models/.train_state", backbone, made[-1], run)
        _through("model_folder.ModelFolderDataset", data / "06_models" / name, write)
        (data / f"08_reporting/{name}_history.json").write_text(json.dumps(history))
        histories[name] = history
    draw_curves(histories["student"], histories["student_dmd"]).savefig(data / "08_reporting/train_curve.png")


def _prepared(project: Path, backbone: Any) -> tuple[Any, ...]:
    """Prompts, embeddings, anchors, the teacher's folder and the anchors' options."""
    from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
    from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
    from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts
    from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
    from dpdmd_pipeline.training.recipe import AnchorRecipe

    data, teacher = project / "data", project / "data/06_models/shapes_teacher"
    stage = PromptsOptions(**_options(project, "prompts", "prompts"))
    files = ("prompts.txt", "prompts_eval.txt")
    raw = [PromptFileDataset(filepath=str(data / "01_raw" / name)).load() for name in files]
    cleaned, report = clean_prompts(*raw, stage)
    (data / "08_reporting/prompts_report.json").write_text(json.dumps(report))
    prompts = _through("prompt_file.PromptFileDataset", data / "03_primary/prompts.jsonl", cleaned)
    encoded = encode_prompts(prompts, teacher, backbone, stage)
    embeddings = _through("sharded.ShardedDataset", data / "05_model_input/embeddings", encoded)
    recipe = AnchorRecipe(**_options(project, "anchors", "anchors"))
    lazy = make_anchors(prompts, embeddings, teacher, backbone, recipe)
    anchors = _through("sharded.ShardedDataset", data / "05_model_input/anchors", lazy)
    return prompts, embeddings, anchors, teacher, recipe


def _options(project: Path, group: str, stage: str) -> dict[str, Any]:
    """A group of conf/base, as changed for these runs."""
    import yaml

    text = (project / f"conf/base/parameters_{stage}.yml").read_text(encoding="utf-8")
    return yaml.safe_load(text)[group] | CHANGES.get(group, {})


def _through(kind: str, place: Path, made: Any) -> Any:
    """Save, and load for the next stage."""
    module, name = kind.split(".")
    dataset = getattr(importlib.import_module(f"dpdmd_pipeline.datasets.{module}"), name)(filepath=str(place))
    dataset.save(made)
    return dataset.load()


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--library", type=Path, help="of a process that this benchmark starts: the project")
    asked.add_argument("--repeats", type=int, default=3)
    options = asked.parse_args()
    if options.library:
        by_library(options.library)
    else:
        main(options.repeats)
