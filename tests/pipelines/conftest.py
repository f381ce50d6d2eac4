"""Small stages: the real classes and datasets, random weights, three prompts."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, ShardedTensors
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.planning.identity import text_side_hash, texts_digest
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

PROMPTS = [
    {"text": "a red circle", "train": True, "eval": True},
    {"text": "a blue square", "train": True, "eval": False},
    {"text": "a green triangle", "train": False, "eval": True},
]
BACKBONE = {
    "family": "sd3",
    "resolution": 32,
    "max_sequence_length": 0,
    "num_steps": 6,
    "guidance_scale": 3.5,
    "level_range": [0.02, 0.98],
    "dtype": "float32",
    "teacher_dtype": None,
}
ONE, TWO = ({"processes": count, "machines": 1, "rendezvous": None} for count in (1, 2))
ANCHORS = {
    "mode": "cached",
    "anchor_levels": [{"steps": 2}],
    "with_denoised": False,
    "seed": 0,
    "seeds_per_prompt": 5,
    "batch_size": 4,
    "shard_size": 4,
    "dtype": "float32",
    "device": "cpu",
    "launch": ONE,
}
OPTIMIZER = {
    "kind": "adamw",
    "learning_rate": 1e-3,
    "lora_learning_rate": 1e-3,
    "betas": [0.9, 0.999],
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}
BASE = Path(__file__).parents[2] / "conf" / "base"
_TRAIN = yaml.safe_load((BASE / "parameters_train.yml").read_text())["train"]
TRAIN = {
    **_TRAIN,
    "seed": 0,
    "max_steps": 2,
    "decay": 0.0,
    "ema": 0.0,
    "batch_size": 2,
    "diversity_weight": 1.0,
    "fake_score_turns": 1,
    "student": OPTIMIZER,
    "fake_score": OPTIMIZER,
    "device": "cpu",
    "checkpoint_every": 1,
    "ratio_every": 2,
    "log_every": 1,
    "previews": 0,
    "track": [],
    "watch": {**_TRAIN["watch"], "every": 0},
}
EVALUATE = {
    "judge": "shapes",
    "by": [],
    "seed": 0,
    "images_per_prompt": 3,
    "batch_size": 6,
    "metric_batch_size": 2,
    "metric_processes": 1,
    "grid_prompts": 12,
    "grid_columns": 2,
    "grid_tile": 32,
    "strict": False,
    "teacher_start": None,
    "save_pictures": False,
    "device": "cpu",
    "launch": ONE,
}


def backbone_options(**changes: Any) -> BackboneOptions:
    return BackboneOptions(**{**BACKBONE, **changes})


def anchor_options(**changes: Any) -> AnchorRecipe:
    return AnchorRecipe(**{**ANCHORS, **changes})


def train_options(**changes: Any) -> TrainOptions:
    return TrainOptions(**{**TRAIN, **changes})


def evaluate_options(**changes: Any) -> EvaluateOptions:
    return EvaluateOptions(**{**EVALUATE, **changes})


def cached(folder: Path, shards: LazyShards) -> ShardedTensors:
    """Save shards and load them as the catalog does for the next stage."""
    dataset = ShardedDataset(filepath=str(folder))
    dataset.save(shards)
    return dataset.load()


def export_tiny(student: Path, teacher: Path, resolution: Any, folder: Path) -> Path:
    """Export a student of a tiny SD3 teacher for diffusers and ComfyUI; returns the folder."""
    from tests.exporting.conftest import export_options

    from dpdmd_pipeline.exporting.formats import Export, read_student

    whole = read_student(student, teacher, "sd3", resolution, 0)
    Export(student=whole, teacher=teacher, **export_options(formats=["diffusers", "comfyui"])).write(folder)
    return folder


def contents(cache: ShardedTensors) -> dict[str, bytes]:
    """Every file of a cache."""
    return {path.name: path.read_bytes() for path in cache._folder.iterdir()}


class Member:
    """A thread that stands for a process: it takes turns with the other, and shares only what they gather."""

    size = 2

    def __init__(self, rank: int, turn: threading.Lock, barrier: threading.Barrier, values: list[bytes]) -> None:
        self.rank, self._turn, self._barrier, self._values = rank, turn, barrier, values

    def end_at_once(self) -> None:
        pass

    def report(self, record: dict[str, Any]) -> None:
        pass

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = pickle.dumps(value)
        self._turn.release()
        try:
            self._barrier.wait()
            values = [pickle.loads(value) for value in self._values]
            self._barrier.wait()  # the next values overwrite these
        finally:
            self._turn.acquire()
        return values


def in_two_threads(work: Any, job: Any) -> Iterator[dict[str, Any]]:
    """Stand in for a launch of two processes, each of which would load diffusers for seconds; yields no reports."""
    turn, barrier, values = threading.Lock(), threading.Barrier(2, timeout=60), [b"", b""]
    pickled = pickle.dumps(job)

    def run(rank: int) -> None:
        with turn:
            try:
                work(pickle.loads(pickled), Member(rank, turn, barrier, values))
            except Exception:
                barrier.abort()
                raise

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(run, range(2)))
    yield from ()


def shared_by_two(shards: LazyShards) -> LazyShards:
    """The same shards, written as by the two processes that their options name."""
    assert shards.launch.keywords["launch"].processes == 2
    return replace(shards, launch=in_two_threads)


@pytest.fixture(scope="session")
def embeddings(tiny_teacher: Path, tmp_path_factory) -> ShardedTensors:
    texts = [record["text"] for record in PROMPTS]
    encode = {"00000": lambda: backbone_options().load(tiny_teacher, "cpu").encode([*texts, ""])}
    manifest = {"texts": texts_digest(PROMPTS), "teacher_text": text_side_hash(tiny_teacher)}
    return cached(tmp_path_factory.mktemp("encoded") / "embeddings", LazyShards(encode, "of the tests", manifest))


@pytest.fixture(scope="session")
def anchors(tiny_teacher: Path, embeddings, tmp_path_factory) -> ShardedTensors:
    from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors

    shards = make_anchors(PROMPTS, embeddings, tiny_teacher, backbone_options(), anchor_options(), train_options())
    return cached(tmp_path_factory.mktemp("anchored") / "anchors", shards)
