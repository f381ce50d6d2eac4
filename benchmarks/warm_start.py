"""Cycles of DP-DMD that bring back the modes of a student that DMD has collapsed, against DP-DMD from the teacher.

    python benchmarks/warm_start.py FOLDER [--env shapes_sdxl] [--seeds 0 1 2] [--cycles 5 10 25 50]

FOLDER keeps caches, students and results: started again, the run goes on where it was. The table is for docs/study.md.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.prompts.nodes import clean_prompts, encode_prompts
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
from dpdmd_pipeline.pipelines.study.nodes import run_study, summarise
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe
from record import ROOT, record
from workload import load_parameters, save_and_load

DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}
TEACHERS = {"base": "shapes_teacher", "shapes_sdxl": "shapes_sdxl_teacher"}


def prepare(folder: Path, env: str) -> tuple[Any, ...]:
    """Clean and encode the environment's prompts and make its anchors; returns the inputs of `run_study`."""
    parameters, teacher = load_parameters(env), ROOT / "data/06_models" / TEACHERS[env]
    backbone, anchors = BackboneOptions(**parameters["backbone"]), AnchorRecipe(**parameters["anchors"])
    raw = [
        PromptFileDataset(filepath=str(ROOT / f"data/01_raw/{name}.txt")).load() for name in ("prompts", "prompts_eval")
    ]
    options, prompts = (
        PromptsOptions(**parameters["prompts"]),
        PromptFileDataset(filepath=str(folder / "prompts.jsonl")),
    )
    prompts.save(clean_prompts(*raw, options)[0])
    rows = prompts.load()
    embeddings = save_and_load(folder / "embeddings", encode_prompts(rows, teacher, backbone, options))
    cache = save_and_load(folder / "anchors", make_anchors(rows, embeddings, teacher, backbone, anchors))
    train, evaluate = TrainOptions(**parameters["train"]), EvaluateOptions(**parameters["evaluate"])
    return rows, embeddings, cache, teacher, folder / "state", backbone, anchors, train, evaluate


def _prompt_file(path: Path) -> PromptFileDataset:
    return PromptFileDataset(filepath=str(path))


def collapsed_student(folder: Path, inputs: tuple[Any, ...], seed: int) -> Path:
    """Train DMD's student of a seed, which loses modes, into a folder; the study judges the same one."""
    *caches, backbone, anchors, train, _ = inputs
    path = folder / f"dmd_{seed}"
    path.mkdir(exist_ok=True)
    write, _ = train_student(
        *caches, None, backbone, anchors, TrainOptions(**{**train.model_dump(), **DMD, "seed": seed})
    )
    write(path)
    return path


def runs_of(start: Path, cycles: list[int]) -> dict[str, Any]:
    """Runs of the study: from the collapsed student, then with the teacher's fake score, then from the teacher."""
    warm = {f"warm_{count}": {"start_from": str(start), "max_steps": count} for count in cycles}
    other = {f"{name}_fake_score_of_teacher": {**train, "fake_score_from": "teacher"} for name, train in warm.items()}
    cold = {f"cold_{count}": {"max_steps": count} for count in cycles}
    return {name: {"train": train} for name, train in {"dmd": DMD, **warm, **other, **cold}.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("folder", type=Path)
    options.add_argument("--env", choices=TEACHERS, default="base")
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--cycles", type=int, nargs="+", default=[5, 10, 25, 50])
    args = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    folder = args.folder / args.env
    folder.mkdir(parents=True, exist_ok=True)
    inputs, results = prepare(folder, args.env), {}
    for seed in args.seeds:
        runs = runs_of(collapsed_student(folder, inputs, seed), args.cycles)
        study = run_study(*inputs, StudyOptions(seeds=[seed], baseline="dmd", runs=runs))
        values = {name: {key: value[0] for key, value in row.items()} for name, row in summarise(study).items()}
        results[f"seed {seed}"] = {"teacher": study["teacher"], **values}
        print(json.dumps(values, indent=1))
    record(f"warm_start_{args.env}", results)


if __name__ == "__main__":
    main()
