"""Cost of the embedded default's evaluation: seconds per picture for sampling and scoring, and for the whole stage.

Sampling is timed on one shard of 64 pictures. Scoring is timed on a whole evaluation's number of pictures of the world,
by the stage's own node with the options of conf/base. The whole is computed from both. Students have the teacher's
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

import timing
from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.backbones.student_file import save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedTensors
from dpdmd_pipeline.pipelines.evaluate.nodes import score_images
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.pictures import MODELS
from dpdmd_pipeline.pipelines.evaluate.sampling import SHARD, sample_images
from dpdmd_pipeline.pipelines.evaluate.scoring import make_settings, requested_presets
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet
from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, gallery, prompt_index
from record import ROOT, record
from workload import cache_embeddings, load_parameters, read_prompts, save_and_load

TEACHER, STUDENT, SCORING = "teacher", "student", "scoring"
FOLDERS = ROOT / "data/06_models"


@dataclass(frozen=True)
class Evaluation:
    """The timed work and its inputs.

    Attributes:
        folder: for temporary files.
        prompts: of the whole evaluation.
        student: folder of one student; both take the same time.
        images: pictures of three models, like the stage's cache.
    """

    folder: Path
    prompts: list[str]
    backbone: BackboneOptions
    options: EvaluateOptions
    embeddings: ShardedTensors
    student: Path
    images: ShardedTensors

    @property
    def pictures(self) -> int:
        """Number of pictures per model."""
        return len(self.prompts) * self.options.images_per_prompt

    @property
    def pictures_per_call(self) -> dict[str, int]:
        """Number of pictures in one call of each contender."""
        presets = {preset.full_name: self.pictures for preset in requested_presets(self.options)}
        return {TEACHER: SHARD, STUDENT: SHARD, SCORING: len(MODELS) * self.pictures, **presets}

    def sampling(self, model: str) -> Callable[[], Any]:
        """A call that draws the first shard of one model, which stays loaded."""
        records = [{"text": text, "train": False, "eval": True} for text in self.prompts]
        prompts = dict(enumerate(self.prompts))
        folders = FOLDERS / "shapes_teacher", self.student, self.student
        lazy = sample_images(prompts, records, self.embeddings, *folders, self.backbone, self.options)
        return lazy.shards[f"{model}-00000"]

    def scoring(self) -> None:
        """Score all pictures like the stage, with an empty cache."""
        state = Path(tempfile.mkdtemp(dir=self.folder))
        folders = state, self.folder / "no_weights", FOLDERS / "shapes_clip"
        score_images(self.images, dict(enumerate(self.prompts)), *folders, self.options)

    def presets(self) -> dict[str, Callable[[], Any]]:
        """Calls that score one preset each, on one model's pictures, without features cached by another preset."""
        settings = make_settings(self.folder / "no_weights", FOLDERS / "shapes_clip", self.options)
        shards = [*self.images.shards()][: len(self.prompts)]  # of the first model
        sets = [TensorSet(text, text, shard["image"]) for text, shard in zip(self.prompts, shards, strict=True)]
        return {p.full_name: partial(_score_anew, sets, p, settings) for p in requested_presets(self.options)}


def _score_anew(sets: list[TensorSet], preset: Any, settings: Any) -> None:
    score(sets, [preset], settings, Reference(sets))


def main(args: argparse.Namespace) -> None:
    """Time sampling and scoring in turn."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder:
        work = prepare(Path(folder))
        sampling = {TEACHER: work.sampling("teacher"), STUDENT: work.sampling("dp_dmd")}
        contenders = {**sampling, SCORING: work.scoring, **work.presets()}
        durations = timing.alternate(contenders, args.seconds, at_least=3)
    which = timing.clock(resolve_device(work.options.device))
    record("evaluate", {**_result(work, durations, which), **timing.conditions()})


def _result(work: Evaluation, durations: dict[str, list[timing.Duration]], which: str) -> dict[str, Any]:
    """Seconds per picture, and the limits that they must keep."""
    by_clock = {
        clock: {
            name: [s / work.pictures_per_call[name] for s in timing.seconds(calls, clock)]
            for name, calls in durations.items()
        }
        for clock in ("cpu", "wall")
    }
    seconds, whole = by_clock[which], {clock: _whole(work, values) for clock, values in by_clock.items()}
    return {
        **{f"{name}, seconds per picture": timing.spread(values) for name, values in seconds.items()},
        "scoring over sampling, mean of teacher and both students (wanted: at most .1)": timing.spread(
            [s / ((t + 2 * u) / 3) for s, t, u in zip(*map(seconds.get, (SCORING, TEACHER, STUDENT)), strict=True)]
        ),
        "whole evaluation, pictures": work.pictures * len(MODELS),
        "whole evaluation, seconds of processor time (told from these)": timing.spread(whole["cpu"]),
        "whole evaluation, seconds by the wall (told from these; wanted: at most 120)": timing.spread(whole["wall"]),
        "seconds are": timing.UNITS[which],
        "options": work.options.model_dump(mode="json"),
    }


def _whole(work: Evaluation, seconds: dict[str, list[float]]) -> list[float]:
    """Seconds to draw and score all pictures, round by round, without loading models and starting Kedro."""
    rounds = zip(*(seconds[name] for name in (TEACHER, STUDENT, SCORING)), strict=True)
    return [work.pictures * (teacher + 2 * student + 3 * scoring) for teacher, student, scoring in rounds]


# ---- workload


def prepare(folder: Path) -> Evaluation:
    """The default's options and prompts, a student with the teacher's weights, and pictures of the world itself."""
    parameters = load_parameters("base")
    backbone, options = BackboneOptions(**parameters["backbone"]), EvaluateOptions(**parameters["evaluate"])
    prompts, teacher = read_prompts("prompts_eval.txt"), FOLDERS / "shapes_teacher"
    embeddings = cache_embeddings(folder / "embeddings", prompts, teacher, backbone, options.device)
    student = _save_student(folder / "student", teacher, backbone, parameters["train"])
    images = save_and_load(folder / "images", _world(prompts, options))
    return Evaluation(folder, prompts, backbone, options, embeddings, student, images)


def _save_student(folder: Path, teacher: Path, backbone: BackboneOptions, train: dict[str, Any]) -> Path:
    folder.mkdir()
    model = backbone.load(teacher, "cpu")
    levels = model.student_schedule(train["grid"], train["num_steps"])
    save_student(folder, model.load_model(), StudentHeader(backbone.family, levels.sigma.tolist()))
    return folder


def _world(prompts: list[str], options: EvaluateOptions) -> LazyShards:
    """Pictures in the layout of the stage's cache: random modes of the world for each model and prompt."""
    world = gallery().view(NUM_PROMPTS, NUM_MODES, *gallery().shape[1:])

    def shard(model: int, row: int) -> dict[str, torch.Tensor]:
        count = options.images_per_prompt
        modes = torch.randint(NUM_MODES, (count,), generator=torch.Generator().manual_seed(model))
        pictures = (world[prompt_index(prompts[row]), modes] * 255).round().to(torch.uint8)
        indices = {"model": torch.full((count,), model), "prompt": torch.full((count,), row)}
        return {**indices, "seed": torch.arange(count), "image": pictures}

    shards = {
        f"{name}-{row:05d}": partial(shard, model, row)
        for model, name in enumerate(MODELS)
        for row in range(len(prompts))
    }
    return LazyShards(shards, "of a benchmark", {})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="no further round starts after these")
    main(parser.parse_args())
