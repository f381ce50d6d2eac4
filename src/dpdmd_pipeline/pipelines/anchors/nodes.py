"""Nodes of the anchors stage."""

import hashlib
import heapq
import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.backbones.sizes import sizes_of
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.pipelines.anchors.shards import load_teacher, make_shards, samples_by_size
from dpdmd_pipeline.planning.checks import anchor_steps
from dpdmd_pipeline.planning.cost import anchored_prompts
from dpdmd_pipeline.planning.identity import check_embeddings, code_hash
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe
from dpdmd_pipeline.wording import counted, made

log = logging.getLogger(__name__)

IN_THE_ANCHORS = {"family", "resolution", "num_steps", "guidance_scale", "dtype", "teacher_dtype"}  # of BackboneOptions


def make_anchors(
    prompts: Iterable[dict],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: AnchorRecipe,
    train: TrainOptions,
) -> LazyShards:
    """Run the guided teacher K steps from seeded noise for the training prompts; cache seeds and latents.

    If the students draw fewer samples than there are training prompts, as many prompts get one anchor each. Several
    picture sizes share the anchors, one size after the other.
    """
    check_embeddings(embeddings, prompts, teacher)
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    manifest, sizes = make_manifest(rows, embeddings, teacher, backbone, options), sizes_of(backbone.resolution)
    if options.mode == "online":
        log.info("anchors: online, computed in each cycle")
        made.info("none: they are computed in each cycle")
        shards = {}
    else:
        count, seeds_per_prompt = anchored_prompts(len(rows), options, train)
        if count < len(rows):
            log.info("anchors: of %d prompts of %d, training draws no more samples", count, len(rows))
            rows = _choose(prompts, count, options.seed)
        manifest["anchored_prompts"] = count
        after = ", ".join(map(str, manifest["anchor_steps"]))
        made.info("%s after %s of the teacher's steps", counted(count * seeds_per_prompt, "anchor"), after)
        parts = samples_by_size(rows, len(sizes), seeds_per_prompt, options.seed)
        if len(sizes) > 1:
            manifest["rows_by_size"] = [len(part) for part in parts]
        load = LastLoaded(partial(load_teacher, embeddings, teacher, backbone, options, manifest["anchor_steps"]))
        shards = make_shards(load, sizes, parts, options)
    identity = fingerprint(manifest, code_hash("pipelines.anchors.shards", f"backbones.{backbone.family}"))
    launch = options.launch.of_shards(identity[:16], options.device)
    return LazyShards(shards, identity, manifest, launch, one_shape=len(sizes) == 1)


def _choose(prompts: Iterable[dict], count: int, seed: int) -> list[int]:
    """Rows of some training prompts, by a hash of their texts: other prompts change few of them."""
    keys = (
        (hashlib.sha256(f"{seed}/{record['text']}".encode()).digest(), row)
        for row, record in enumerate(prompts)
        if record["train"]
    )
    return sorted(row for _, row in heapq.nsmallest(count, keys))


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
