"""What the embedded default's evaluation costs: seconds a picture of sampling and of scoring, and all of it together.

A shard of 64 pictures is drawn as the stage draws it, and as many pictures of the world as the stage would draw are
scored by its own node, with the options of conf/base; the whole is told from these. Students have the teacher's
weights: a network's time does not depend on them.

    python benchmarks/bench_evaluate.py
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kedro.config import OmegaConfigLoader

import timing
from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.backbones.student_file import StudentHeader, save_student
from dpdmd_pipeline.datasets.lineage import text_side_hash, texts_digest
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, ShardedTensors
from dpdmd_pipeline.pipelines.evaluate.nodes import score_images
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.pictures import MODELS
from dpdmd_pipeline.pipelines.evaluate.sampling import SHARD, sample_images
from dpdmd_pipeline.pipelines.evaluate.scoring import asked_presets, make_settings
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, gallery, prompt_index
from record import ROOT, record

TEACHER, STUDENT, SCORING = "teacher", "student", "scoring"
FOLDERS = ROOT / "data/06_models"


@dataclass(frozen=True)
class Evaluation:
    """What is timed, and on what.

    Attributes:
        folder: scratch.
        prompts: of the whole evaluation.
        student: folder of one; both students take the same time.
        drawn: pictures of three models, as the stage's cache has them.
    """

    folder: Path
    prompts: list[str]
    backbone: BackboneOptions
    options: EvaluateOptions
    embeddings: ShardedTensors
    student: Path
    drawn: ShardedTensors

    @property
    def pictures(self) -> int:
        """Of one model."""
        return len(self.prompts) * self.options.images_per_prompt

    @property
    def a_turn(self) -> dict[str, int]:
        """Pictures of each contender's turn."""
        presets = {preset.full_name: self.pictures for preset in asked_presets(self.options)}
        return {TEACHER: SHARD, STUDENT: SHARD, SCORING: len(MODELS) * self.pictures, **presets}

    def sampling(self, model: str) -> Callable[[], Any]:
        """Draws the first shard of one model, which stays loaded."""
        records = [{"text": text, "train": False, "eval": True} for text in self.prompts]
        chosen = dict(enumerate(self.prompts))
        folders = FOLDERS / "shapes_teacher", self.student, self.student
        lazy = sample_images(chosen, records, self.embeddings, *folders, self.backbone, self.options)
        return lazy.shards[f"{model}-00000"]

    def scoring(self) -> None:
        """All that the stage makes of the pictures, nothing being known of them."""
        state = Path(tempfile.mkdtemp(dir=self.folder))
        places = state, self.folder / "no_weights", FOLDERS / "shapes_clip"
        score_images(self.drawn, dict(enumerate(self.prompts)), *places, self.options)

    def presets(self) -> dict[str, Callable[[], Any]]:
        """Each preset alone, on one model's pictures; none finds features that another has kept."""
        settings = make_settings(self.folder / "no_weights", FOLDERS / "shapes_clip", self.options)
        shards = [*self.drawn.shards()][: len(self.prompts)]  # of the first model
        sets = [TensorSet(text, text, shard["image"]) for text, shard in zip(self.prompts, shards, strict=True)]
        return {p.full_name: partial(_score_anew, sets, p, settings) for p in asked_presets(self.options)}


def _score_anew(sets: list[TensorSet], preset: Any, settings: Any) -> None:
    score(sets, [preset], settings, Reference(sets))


def main(asked: argparse.Namespace) -> None:
    """Sampling and scoring in turn."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        found = prepare(Path(folder))
        sampling = {TEACHER: found.sampling("teacher"), STUDENT: found.sampling("dp_dmd")}
        contenders = {**sampling, SCORING: found.scoring, **found.presets()}
        taken = timing.alternate(contenders, asked.seconds, at_least=3)
    which = timing.clock(resolve_device(found.options.device))
    record("evaluate", {**_told(found, taken, which), **timing.conditions()})


def _told(found: Evaluation, taken: dict[str, list[timing.Taken]], which: str) -> dict[str, Any]:
    """Seconds a picture, and what was wanted of them."""
    of = {
        clock: {name: [s / found.a_turn[name] for s in timing.of(turns, clock)] for name, turns in taken.items()}
        for clock in ("cpu", "wall")
    }
    seconds, whole = of[which], {clock: _whole(found, values) for clock, values in of.items()}
    return {
        **{f"{name}, seconds per picture": timing.spread(values) for name, values in seconds.items()},
        "scoring over sampling, mean of teacher and both students (wanted: at most .1)": timing.spread(
            [s / ((t + 2 * u) / 3) for s, t, u in zip(*map(seconds.get, (SCORING, TEACHER, STUDENT)), strict=True)]
        ),
        "whole evaluation, pictures": found.pictures * len(MODELS),
        "whole evaluation, seconds of processor time (told from these)": timing.spread(whole["cpu"]),
        "whole evaluation, seconds by the wall (told from these; wanted: at most 120)": timing.spread(whole["wall"]),
        "seconds are": {"cpu": "of this process's processor time", "wall": "by the wall"}[which],
        "options": found.options.model_dump(mode="json"),
    }


def _whole(found: Evaluation, seconds: dict[str, list[float]]) -> list[float]:
    """Seconds of all pictures, drawn and scored, round by round; loading models and Kedro's own start are not in it."""
    rounds = zip(*(seconds[name] for name in (TEACHER, STUDENT, SCORING)), strict=True)
    return [found.pictures * (teacher + 2 * student + 3 * scoring) for teacher, student, scoring in rounds]


# ---- what it runs on


def prepare(folder: Path) -> Evaluation:
    """The default's options and prompts, a student with the teacher's weights, and pictures of the world itself."""
    parameters = OmegaConfigLoader(str(ROOT / "conf"), env="base", **CONFIG_LOADER_ARGS)["parameters"]
    backbone, options = BackboneOptions(**parameters["backbone"]), EvaluateOptions(**parameters["evaluate"])
    prompts = (ROOT / "data/01_raw/prompts_eval.txt").read_text(encoding="utf-8").split("\n")[:-1]
    teacher = FOLDERS / "shapes_teacher"
    manifest = {"texts": texts_digest({"text": text} for text in prompts), "teacher_text": text_side_hash(teacher)}
    encode = {"00000": lambda: backbone.load(teacher, options.device).encode([*prompts, ""])}
    embeddings = _cached(folder / "embeddings", LazyShards(encode, "of a benchmark", manifest))
    student = _student(folder / "student", teacher, backbone, parameters["train"])
    drawn = _cached(folder / "images", _world(prompts, options))
    return Evaluation(folder, prompts, backbone, options, embeddings, student, drawn)


def _student(folder: Path, teacher: Path, backbone: BackboneOptions, train: dict[str, Any]) -> Path:
    folder.mkdir()
    model = backbone.load(teacher, "cpu")
    levels = model.student_schedule(train["grid"], train["num_steps"])
    save_student(folder, model.load_model(), StudentHeader(backbone.family, levels.sigma.tolist()))
    return folder


def _world(prompts: list[str], options: EvaluateOptions) -> LazyShards:
    """Pictures as the stage's cache has them: of each model and prompt, some modes of the world."""
    world = gallery().view(NUM_PROMPTS, NUM_MODES, *gallery().shape[1:])

    def shard(model: int, row: int) -> dict[str, torch.Tensor]:
        count = options.images_per_prompt
        modes = torch.randint(NUM_MODES, (count,), generator=torch.Generator().manual_seed(model))
        pictures = (world[prompt_index(prompts[row]), modes] * 255).round().to(torch.uint8)
        told = {"model": torch.full((count,), model), "prompt": torch.full((count,), row)}
        return {**told, "seed": torch.arange(count), "image": pictures}

    shards = {
        f"{name}-{row:05d}": partial(shard, model, row)
        for model, name in enumerate(MODELS)
        for row in range(len(prompts))
    }
    return LazyShards(shards, "of a benchmark", {})


def _cached(folder: Path, shards: LazyShards) -> ShardedTensors:
    """What the catalog gives to the next stage."""
    dataset = ShardedDataset(filepath=str(folder))
    dataset.save(shards)
    return dataset.load()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="after which no other round begins")
    main(parser.parse_args())
