"""What the benchmarks of training run on: a teacher, its prompts, warm caches, and the options of an environment."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from kedro.config import OmegaConfigLoader

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, ShardedTensors
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.train.setup import Job, start
from dpdmd_pipeline.planning.identity import text_side_hash, texts_digest
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe
from dpdmd_pipeline.training.roles import Roles, make_roles
from random_teacher import CONFIGS, make_random_teacher
from record import ROOT
from reference_recipe import PublishedLoop, PublishedSettings

NEVER = 10**6  # cycles; more than any benchmark runs
PROMPTS = ROOT / "data/01_raw/prompts.txt"
# Options that make a cycle cheaper and change the student
FAST: dict[str, Any] = {"graded_steps": "random", "fake_rollout": "shared"}
# What `Workload.cheaper` changes, in words
CHEAPER = "pictures of a cycle drawn at once, fused AdamW"
# The loop alone is timed: each cycle gives its record, and nothing that happens once in many turns happens
LOOP_ALONE = {
    "max_steps": NEVER,
    "decay": 0.0,
    "warmup": 0,
    "fake_score_warmup": 0,
    "fetch_every": 1,
    "checkpoint_every": NEVER,
    "ratio_every": NEVER,
}


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all of these benchmarks have; without any, the embedded teacher on the CPU."""
    found = argparse.ArgumentParser(description=description.splitlines()[0])
    found.add_argument("--env", default="base", help="environment of conf/ whose options are taken")
    teacher = found.add_mutually_exclusive_group()
    teacher.add_argument("--teacher", type=Path, default=ROOT / "data/06_models/shapes_teacher", help="pipeline folder")
    teacher.add_argument("--config", choices=CONFIGS, help="random weights of this configuration instead")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the networks")
    found.add_argument("--resolution", type=int, help="of the pictures")
    found.add_argument("--batch", type=int, default=16, help="samples of a turn")
    found.add_argument("--anchor-steps", type=int, help="teacher steps K of the anchor")
    found.add_argument("--roles", choices=["full", "lora"], help="three networks, or one with two adapters")
    found.add_argument("--seconds", type=float, default=60, help="after which no other round begins")
    found.add_argument("--result", help="name of the result file, if not that of the benchmark")
    return found


class KeepsNothing(Checkpoints):
    """Writes no state: a benchmark's student is thrown away."""

    def save(self, step: int, state: dict[str, Any], *, finished: bool = False) -> None:
        pass


@dataclass(frozen=True)
class Workload:
    """One teacher and everything that training on it needs.

    Attributes:
        folder: scratch.
        teacher: pipeline folder.
        train: options of the paper-faithful run.
        anchors: by mode, `cached` on disk and `online`.
    """

    folder: Path
    teacher: Path
    backbone: BackboneOptions
    anchor_recipe: AnchorRecipe
    train: TrainOptions
    prompts: list[str]
    embeddings: ShardedTensors
    anchors: dict[str, Any]

    @property
    def device(self) -> torch.device:
        return resolve_device(self.train.device)

    @property
    def cheaper(self) -> dict[str, Any]:
        """Options that make a cycle cheaper and change the student by rounding only."""
        return {"rollout_micro_batch": self.train.fake_score_turns * self.train.batch_size, "fused": True}

    def options(self, **changes: Any) -> TrainOptions:
        """The run's options with some of them changed.

        Raises:
            ValueError: if an option is not known or does not fit the others.
        """
        return TrainOptions(**{**self.train.model_dump(), **changes})

    def start(self, options: TrainOptions, mode: str = "cached") -> tuple[Roles, Iterator[dict]]:
        """Our loop, on networks of its own; each record that is asked for is one cycle.

        Close the records when done: an open loop would save its state when the program ends.
        """
        checkpoints = KeepsNothing(self.folder / "state")
        rows = list(range(len(self.prompts)))
        job = Job(rows, self.embeddings, self.anchors[mode], self.teacher, self.backbone, options, checkpoints)
        _, roles, records = start(job, resumed=None)
        return roles, records

    def reference(self, options: TrainOptions, roles: Roles | None = None, pictures_every: int = 1) -> PublishedLoop:
        """The published loop, with the numbers of the same options.

        Args:
            options: of our run.
            roles: networks to train; None gives it its own.
            pictures_every: student turns; the published code writes pictures in every one.
        """
        family = self.backbone.load(self.teacher, options.device)
        roles = roles or make_roles(
            family, options.recipe(), gradient_checkpointing=options.gradient_checkpointing, sharded=False
        )
        pictures = self.folder / "pictures"
        pictures.mkdir(exist_ok=True)
        settings = PublishedSettings(
            prompts=self.prompts,
            batch_size=options.batch_size,
            num_steps=options.num_steps,
            teacher_steps=self.backbone.num_steps,
            anchor_steps=self.anchor_recipe.anchor_levels[0].steps,
            guidance_scale=self.backbone.guidance_scale,
            diversity_weight=options.diversity_weight,
            fake_score_turns=options.fake_score_turns,
            learning_rate=options.student.learning_rate,
            max_grad_norm=options.student.max_grad_norm,
            pictures_every=pictures_every,
            pictures=pictures,
        )
        return PublishedLoop(family, roles.teacher, roles.student, roles.fake_score, settings)

    def settings(self) -> dict[str, Any]:
        """What a result must tell of this workload."""
        names = ("roles", "precision", "batch_size", "student_micro_batch", "num_steps", "fake_score_turns", "device")
        return {
            **self.backbone.model_dump(include={"family", "resolution", "num_steps", "guidance_scale"}),
            "teacher": self.teacher.name,
            "anchor_steps": self.anchor_recipe.anchor_levels[0].steps,
            "train": {name: getattr(self.train, name) for name in (*names, "gradient_checkpointing")},
        }


def prepare(asked: argparse.Namespace, folder: Path, **changes: Any) -> Workload:
    """Encode the prompts and make the anchors of a few batches, once.

    Args:
        asked: what `parser` parsed.
        folder: scratch.
        changes: of the training options.
    """
    parameters = OmegaConfigLoader(str(ROOT / "conf"), env=asked.env, **CONFIG_LOADER_ARGS)["parameters"]
    backbone = BackboneOptions(**{**parameters["backbone"], **_given(dtype=asked.dtype, resolution=asked.resolution)})
    teacher = asked.teacher
    if asked.config:
        teacher = make_random_teacher(folder / asked.config, CONFIGS[asked.config], getattr(torch, backbone.dtype))
    sizes = ("batch_size", "student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")
    run = {**LOOP_ALONE, **dict.fromkeys(sizes, asked.batch), "device": asked.device, "precision": backbone.dtype}
    options = TrainOptions(**{**parameters["train"], **run, **_given(roles=asked.roles), **changes})
    steps = asked.anchor_steps or parameters["anchors"]["anchor_levels"][0]["steps"]
    recipe = {**parameters["anchors"], "anchor_levels": [{"steps": steps}], "device": asked.device}
    return _with_caches(folder, teacher, backbone, recipe, options)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _with_caches(
    folder: Path, teacher: Path, backbone: BackboneOptions, recipe: dict[str, Any], train: TrainOptions
) -> Workload:
    """One anchor per prompt: the loop reads them again and again, as it does in later epochs."""
    prompts = PROMPTS.read_text(encoding="utf-8").split("\n")[:-1]
    records = [{"text": text, "train": True, "eval": False} for text in prompts]
    manifest = {"texts": texts_digest(records), "teacher_text": text_side_hash(teacher)}
    encode = {"00000": lambda: backbone.load(teacher, train.device).encode([*prompts, ""])}
    embeddings = _cached(folder / "embeddings", LazyShards(encode, "of a benchmark", manifest))
    anchors, fewer = {}, {"seeds_per_prompt": 1, "batch_size": min(len(prompts), 2 * train.batch_size)}
    for mode in ("cached", "online"):
        chosen = AnchorRecipe(**{**recipe, **fewer, "mode": mode})
        anchors[mode] = _cached(folder / mode, make_anchors(records, embeddings, teacher, backbone, chosen))
    return Workload(folder, teacher, backbone, chosen, train, prompts, embeddings, anchors)


def _cached(folder: Path, shards: LazyShards) -> ShardedTensors:
    """What the catalog gives to the next stage."""
    dataset = ShardedDataset(filepath=str(folder))
    dataset.save(shards)
    return dataset.load()
