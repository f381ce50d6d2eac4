"""What caching anchors costs on top of the teacher, and how long training waits for the cache.

Bare teacher forwards and the whole anchors stage (seeds, teacher, shards, hashes, fsync) run alternately.
"""

import logging
import statistics
import tempfile
import time
from pathlib import Path

import torch
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from dpdmd_pipeline.backbones.base import guided
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import ShardedDataset
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe
from record import copy_project, record

REPEATS = 5
STEPS = 6


def bare_teacher(model, network, embeddings, rows, batch_size, last_step, backbone) -> float:
    """Seconds of the guided rollouts alone, their noise ready."""
    uncond = embeddings.rows([len(embeddings) - 1])
    levels = model.schedule(backbone.num_steps)[: last_step + 1]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    noises = [noise_from_seeds(range(len(batch)), model.latent_shape) for batch in batches]
    conds = [embeddings.rows(batch) for batch in batches]
    begun = time.perf_counter()
    with torch.no_grad():
        for noise, cond in zip(noises, conds, strict=True):
            rollout(guided(model, network, cond, uncond, backbone.guidance_scale), noise, levels)
    return time.perf_counter() - begun


def main() -> None:
    """Measure on the embedded teacher with the parameters of conf/base."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, embeddings, teacher, parameters = prepare(copy_project(folder))
        logging.disable(logging.INFO)
        measure(prompts, embeddings, teacher, parameters)


def prepare(project: Path) -> tuple:
    """Prompts, embeddings and teacher of a project, and its parameters."""
    bootstrap_project(project)
    with KedroSession.create(project, env="base") as session:
        session.run(pipeline_names=["prompts"])
    with KedroSession.create(project, env="base") as session:
        context = session.load_context()
        found = (context.catalog.load(name) for name in ("prompts", "embeddings", "teacher"))
        return *found, context.config_loader["parameters"]


def measure(prompts, embeddings, teacher: Path, parameters: dict) -> None:
    """Time both, alternately; then a short training."""
    backbone = BackboneOptions(**parameters["backbone"])
    options = AnchorRecipe(**{**parameters["anchors"], "seeds_per_prompt": 8})
    rows = [row for row, record_ in enumerate(prompts) if record_["train"]] * options.seeds_per_prompt
    model = backbone.load(teacher, "cpu")
    network = model.load_model().requires_grad_(False).eval()
    bare, cached = [], []
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(REPEATS):
            lazy = make_anchors(prompts, embeddings, teacher, backbone, options)
            last_step = lazy.manifest["anchor_steps"][-1]
            bare.append(bare_teacher(model, network, embeddings, rows, options.batch_size, last_step, backbone))
            begun = time.perf_counter()
            ShardedDataset(filepath=f"{folder}/{repeat}").save(lazy)
            cached.append(time.perf_counter() - begun)
        anchors = ShardedDataset(filepath=f"{folder}/0").load()
        train = TrainOptions(**{**parameters["train"], "max_steps": STEPS, "checkpoint_every": 1000})
        waited = time_reads(anchors)
        begun = time.perf_counter()
        train_student(prompts, embeddings, anchors, teacher, Path(folder) / "state", backbone, options, train)
        trained = time.perf_counter() - begun
    record(
        "anchors",
        {
            "anchors": len(rows),
            "bare teacher forwards, seconds (median)": statistics.median(bare),
            "anchors stage, seconds (median)": statistics.median(cached),
            "overhead of the stage (median of ratios)": statistics.median(
                c / b for b, c in zip(bare, cached, strict=True)
            )
            - 1,
            "training steps": STEPS,
            "training, seconds": trained,
            "share of it spent reading caches": waited["seconds"] / trained,
            "reads": waited["reads"],
        },
    )


def time_reads(anchors) -> dict[str, float]:
    """Count and time every read of a cache from now on."""
    waited = {"seconds": 0.0, "reads": 0}
    cls = type(anchors)
    plain = cls.rows

    def rows(self, indices):
        begun = time.perf_counter()
        found = plain(self, indices)
        waited["seconds"] += time.perf_counter() - begun
        waited["reads"] += 1
        return found

    cls.rows = rows
    return waited


if __name__ == "__main__":
    main()
