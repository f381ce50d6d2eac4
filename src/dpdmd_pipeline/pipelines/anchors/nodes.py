"""Nodes of the anchors stage."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.planning.checks import anchor_steps
from dpdmd_pipeline.planning.identity import check_embeddings, code_hash
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe

log = logging.getLogger(__name__)

IN_THE_ANCHORS = {"family", "resolution", "num_steps", "guidance_scale", "dtype"}  # of BackboneOptions


def make_anchors(
    prompts: Iterable[dict], embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorRecipe
) -> LazyShards:
    """Run the guided teacher K steps from seeded noise for every training prompt; cache seeds and latents."""
    check_embeddings(embeddings, prompts, teacher)
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    manifest = make_manifest(rows, embeddings, teacher, backbone, options)
    if options.mode == "online":
        log.info("anchors: online, computed in each cycle")
        shards = {}
    else:
        load = LastLoaded(partial(_load_teacher, embeddings, teacher, backbone, options, manifest["anchor_steps"]))
        shards = _shards(load, rows, options)
    identity = fingerprint(manifest, code_hash("pipelines.anchors.nodes", f"backbones.{backbone.family}"))
    return LazyShards(shards, identity, manifest, options.launch.of_shards(identity[:16], options.device))


def make_manifest(
    rows: list[int], embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorRecipe
) -> dict[str, Any]:
    """Facts that decide the anchors and that training checks: teacher, schedule, guidance, levels, dtype."""
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    model = backbone.load(teacher, "cpu")
    sigmas = model.schedule(backbone.num_steps).sigma.tolist()
    steps = anchor_steps(options, model, backbone.num_steps)
    log.info("anchors: after %s of the teacher's steps", ", ".join(map(str, steps)))
    return {
        "options": options.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "teacher": folder_hash(network_folder(teacher)),
        "embeddings": embeddings.fingerprint,
        "rows": fingerprint(rows),
        "backbone": backbone.model_dump(mode="json", include=IN_THE_ANCHORS),
        "teacher_sigmas": sigmas,
        "anchor_steps": steps,
        "anchor_sigmas": [sigmas[step] for step in steps],
    }


def _shards(load: LastLoaded, rows: list[int], options: AnchorRecipe) -> dict[str, Any]:
    """Make one thunk per shard; the first one loads the teacher. Prompts alternate within a shard."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    samples = rows * options.seeds_per_prompt
    seeds = sample_seeds(options.seed, "anchors", 0, len(samples))
    shards = {}
    for start in range(0, len(samples), options.shard_size):
        shard = slice(start, start + options.shard_size)
        shards[f"{len(shards):05d}"] = partial(_shard, load, samples[shard], seeds[shard], options)
    return shards


def _load_teacher(
    embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorRecipe, anchor_steps: list[int]
) -> Any:
    """Load the teacher as a function of prompts and seeds."""
    from dpdmd_pipeline.training.anchors import TeacherAnchors

    model = backbone.load(teacher, options.device)
    return TeacherAnchors(
        model,
        model.load_model(),
        embeddings,
        num_steps=backbone.num_steps,
        guidance_scale=backbone.guidance_scale,
        anchor_steps=anchor_steps,
        with_denoised=options.with_denoised,
    )


def _shard(load: LastLoaded, prompts: list[int], seeds: list[int], options: AnchorRecipe) -> dict[str, Any]:
    """Compute one shard: prompt, seed, and the anchors in the dtype of the cache."""
    import torch

    teacher, batches = load(), []
    for start in range(0, len(prompts), options.batch_size):
        chunk = slice(start, start + options.batch_size)
        batches.append(teacher(prompts[chunk], seeds[chunk]))
    dtype = getattr(torch, options.dtype)
    latents = {name: torch.cat([batch[name] for batch in batches]).to(dtype) for name in batches[0]}
    return {"prompt": torch.tensor(prompts), "seed": torch.tensor(seeds), **latents}
