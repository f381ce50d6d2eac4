"""Workload of the training benchmarks: a teacher, its prompts, warm caches, and the options of an environment."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.backbones.options import BackboneOptions, resolve_device
from dpdmd_pipeline.configuration import ConfigLoader
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

NEVER = 10**6  # cycles, more than any benchmark runs
# Options that make a cycle cheaper and change the student
FAST: dict[str, Any] = {"graded_steps": "random", "fake_rollout": "shared"}
# Name of the changes in `Workload.cheaper`
CHEAPER = "pictures of a cycle drawn at once, fused AdamW"
# Time the loop alone: every cycle yields its record, and nothing else happens between cycles
LOOP_ALONE = {
    "max_steps": NEVER,
    "decay": 0.0,
    "warmup": 0,
    "fake_score_warmup": 0,
    "checkpoint_every": NEVER,
    "ratio_every": NEVER,
}


def parser(description: str) -> argparse.ArgumentParser:
    """Options that all these benchmarks share; the defaults are the embedded teacher on the CPU."""
    options = argparse.ArgumentParser(description=description.splitlines()[0])
    options.add_argument("--env", default="base", help="environment of conf/")
    teacher = options.add_mutually_exclusive_group()
    teacher.add_argument("--teacher", type=Path, default=ROOT / "data/06_models/shapes_teacher", help="pipeline folder")
    teacher.add_argument("--config", choices=CONFIGS, help="use random weights of this configuration instead")
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    options.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the networks")
    options.add_argument("--resolution", type=int, help="of the pictures")
    options.add_argument("--batch", type=int, default=16, help="samples of an update")
    options.add_argument("--anchor-steps", type=int, help="teacher steps K of the anchor")
    options.add_argument("--roles", choices=["full", "lora"], help="three networks, or one with two adapters")
    options.add_argument("--seconds", type=float, default=60, help="no further round starts after these")
    options.add_argument("--result", help="name of the result file; default: the benchmark's")
    return options


class NoCheckpoints(Checkpoints):
    """Saves nothing: a benchmark does not keep its student."""

    def save(self, *args: Any, **options: Any) -> None:
        pass


@dataclass(frozen=True)
class Workload:
    """One teacher and everything that training with it needs.

    Attributes:
        folder: for temporary files.
        teacher: pipeline folder.
        train: options of the paper-faithful run.
        anchors: by mode: `cached` on disk, or `online`.
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
        """Options that make a cycle cheaper and change the student only by rounding."""
        return {"rollout_micro_batch": self.train.fake_score_turns * self.train.batch_size, "fused": True}

    def options(self, **changes: Any) -> TrainOptions:
        """The run's options with some changes.

        Raises:
            ValueError: if an option is unknown or does not fit the others.
        """
        return TrainOptions(**{**self.train.model_dump(), **changes})

    def start(self, options: TrainOptions, mode: str = "cached") -> tuple[Roles, Iterator[dict]]:
        """Our loop with its own networks; `next` on the records runs one cycle.

        Close the records at the end: an open loop saves its state when the program ends.
        """
        checkpoints = NoCheckpoints(self.folder / "state")
        rows = list(range(len(self.prompts)))
        job = Job(rows, self.embeddings, self.anchors[mode], self.teacher, self.backbone, options, checkpoints)
        return start(job)

    def reference(self, options: TrainOptions, roles: Roles | None = None, pictures_every: int = 1) -> PublishedLoop:
        """The published loop, with the same options.

        Args:
            options: of our run.
            roles: networks to train; None makes new ones.
            pictures_every: student updates between pictures; the published code writes them in every update.
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
            fake_score_updates=options.fake_score_turns,
            learning_rate=options.recipe().student.learning_rate,
            max_grad_norm=options.student.max_grad_norm,
            pictures_every=pictures_every,
            pictures=pictures,
        )
        return PublishedLoop(family, roles.teacher, roles.student, roles.fake_score, settings)

    def settings(self) -> dict[str, Any]:
        """Settings of this workload, for the result file."""
        names = ("roles", "precision", "batch_size", "student_micro_batch", "num_steps", "fake_score_turns", "device")
        return {
            **self.backbone.model_dump(include={"family", "resolution", "num_steps", "guidance_scale"}),
            "teacher": self.teacher.name,
            "anchor_steps": self.anchor_recipe.anchor_levels[0].steps,
            "train": {name: getattr(self.train, name) for name in (*names, "gradient_checkpointing")},
        }


def prepare(args: argparse.Namespace, folder: Path) -> Workload:
    """Encode the prompts and make the anchors of a few batches, once.

    Args:
        args: result of `parser`.
        folder: for temporary files.
    """
    parameters = load_parameters(args.env)
    changes = _without_none(dtype=args.dtype, resolution=args.resolution)
    backbone = BackboneOptions(**{**parameters["backbone"], **changes})
    teacher = args.teacher
    if args.config:
        teacher = make_random_teacher(folder / args.config, CONFIGS[args.config], getattr(torch, backbone.dtype))
    run = {**LOOP_ALONE, **same_batch(args.batch), "device": args.device, "precision": backbone.dtype}
    options = TrainOptions(**{**parameters["train"], **run, **_without_none(roles=args.roles)})
    steps = args.anchor_steps or parameters["anchors"]["anchor_levels"][0]["steps"]
    recipe = {**parameters["anchors"], "anchor_levels": [{"steps": steps}], "device": args.device}
    return _with_caches(folder, teacher, backbone, recipe, options)


def load_parameters(env: str) -> dict[str, Any]:
    """All parameters of an environment of conf/."""
    return ConfigLoader(str(ROOT / "conf"), env=env, **CONFIG_LOADER_ARGS)["parameters"]


def same_batch(size: int) -> dict[str, int]:
    """Train options for one batch size without micro-batches."""
    names = ("batch_size", "student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch")
    return dict.fromkeys(names, size)


def _without_none(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _with_caches(
    folder: Path, teacher: Path, backbone: BackboneOptions, recipe: dict[str, Any], train: TrainOptions
) -> Workload:
    """Make one anchor per prompt: the loop reads them again and again, as in later epochs."""
    prompts = read_prompts("prompts.txt")
    records = [{"text": text, "train": True, "eval": False} for text in prompts]
    embeddings = cache_embeddings(folder / "embeddings", prompts, teacher, backbone, train.device)
    few = {"seeds_per_prompt": 1, "batch_size": min(len(prompts), 2 * train.batch_size)}
    recipes = {mode: AnchorRecipe(**{**recipe, **few, "mode": mode}) for mode in ("cached", "online")}
    every_prompt = train.model_copy(update={"max_steps": len(prompts)})
    anchors = {
        mode: save_and_load(
            folder / mode, make_anchors(records, embeddings, teacher, backbone, anchor_recipe, every_prompt)
        )
        for mode, anchor_recipe in recipes.items()
    }
    return Workload(folder, teacher, backbone, recipes["online"], train, prompts, embeddings, anchors)


def read_prompts(name: str) -> list[str]:
    """Lines of a prompt file in data/01_raw."""
    return (ROOT / "data/01_raw" / name).read_text(encoding="utf-8").split("\n")[:-1]


def cache_embeddings(
    folder: Path, prompts: list[str], teacher: Path, backbone: BackboneOptions, device: str
) -> ShardedTensors:
    """Encode the prompts, and the empty one, into a cache."""
    manifest = {"texts": texts_digest({"text": text} for text in prompts), "teacher_text": text_side_hash(teacher)}
    encode = {"00000": lambda: backbone.load(teacher, device).encode([*prompts, ""])}
    return save_and_load(folder, LazyShards(encode, "of a benchmark", manifest))


def save_and_load(folder: Path, shards: LazyShards) -> ShardedTensors:
    """Pass shards through disk, as the catalog does between stages."""
    dataset = ShardedDataset(filepath=str(folder))
    dataset.save(shards)
    return dataset.load()
