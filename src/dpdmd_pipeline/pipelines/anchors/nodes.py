"""Nodes of the anchors stage."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.lineage import check_embeddings, code_hash, network_folder
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, fingerprint
from dpdmd_pipeline.pipelines.anchors.options import AnchorLevel, AnchorsOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT

log = logging.getLogger(__name__)

# Anchors are only taken up by the code that computes them; that of the teacher's family comes to it.
CODE = (
    "backbones/base.py",
    "dpdmd/anchor.py",
    "dpdmd/noise.py",
    "dpdmd/sampling.py",
    "pipelines/anchors/nodes.py",
    "training/anchors.py",
)
IN_THE_ANCHORS = {"family", "resolution", "num_steps", "guidance_scale", "dtype"}  # of BackboneOptions


def make_anchors(
    prompts: Iterable[dict], embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorsOptions
) -> LazyShards:
    """Run the guided teacher K steps from seeded noise for every training prompt; keep seeds and latents."""
    check_embeddings(embeddings, prompts, teacher)
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    manifest = make_manifest(rows, embeddings, teacher, backbone, options)
    if options.mode == "online":
        log.info("anchors: online, computed in each student turn")
        shards = {}
    else:
        shards = _shards(rows, embeddings, teacher, backbone, options, manifest["anchor_steps"])
    identity = fingerprint(manifest, code_hash(*CODE, f"backbones/{backbone.family}.py"))
    return LazyShards(shards, identity, manifest, options.launch.of_shards(identity[:16], options.device))


def make_manifest(
    rows: list[int], embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorsOptions
) -> dict[str, Any]:
    """The facts that anchors depend on and that training checks: teacher, schedule, guidance, levels, dtype."""
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    model = backbone.load(teacher, "cpu")
    sigmas = model.schedule(backbone.num_steps).sigma.tolist()
    steps = [_steps_of(level, model, backbone.num_steps) for level in options.anchor_levels]
    if steps != sorted(set(steps)):
        raise ValueError(f"anchors.anchor_levels give teacher steps {steps}: they must rise, from noisy to clean")
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


def _steps_of(level: AnchorLevel, model: Any, num_steps: int) -> int:
    """Teacher steps K of an anchor level."""
    last = num_steps - 1
    if level.steps is not None:
        if level.steps > last:
            raise ValueError(
                f"anchors.anchor_levels steps={level.steps} must be below the teacher's backbone.num_steps={num_steps}"
            )
        return level.steps
    if last < 1:
        raise ValueError(f"backbone.num_steps={num_steps} leaves no level for an anchor: take at least 2")
    sigmas = _own_sigmas(model.schedule(num_steps), model.prediction)
    asked = level.sigma
    if level.first_step is not None:
        student = model.student_schedule(level.first_step.grid, level.first_step.num_steps)
        asked = _own_sigmas(student, model.prediction)[1]
    if not 0 < asked < sigmas[0]:
        raise ValueError(f"anchors.anchor_levels sigma={asked:g} must lie below the teacher's start, {sigmas[0]:g}")
    nearest = min(range(1, last + 1), key=lambda step: abs(sigmas[step] - asked))
    log.info(
        "anchors: sigma %.4f asked for, the teacher's nearest level is %.4f (K = %d)", asked, sigmas[nearest], nearest
    )
    return nearest


def _own_sigmas(levels: Any, prediction: str) -> list[float]:
    """Noise levels as a family counts them: flow's sigma, or sigma / alpha of a diffusion model."""
    return (levels.sigma if prediction == "flow" else levels.sigma / levels.alpha).tolist()


def _shards(
    rows: list[int],
    embeddings: Any,
    teacher: Path,
    backbone: BackboneOptions,
    options: AnchorsOptions,
    anchor_steps: list[int],
) -> dict[str, Any]:
    """One thunk per shard; the teacher is loaded by the first that runs. Prompts alternate within a shard."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    total = len(rows) * options.seeds_per_prompt
    samples = [rows[index % len(rows)] for index in range(total)]
    seeds = sample_seeds(options.seed, "anchors", 0, total)

    ask = LastLoaded(partial(_load_teacher, embeddings, teacher, backbone, options, anchor_steps))
    starts = range(0, total, options.shard_size)
    return {
        f"{number:05d}": partial(
            _shard, ask, samples[start : start + options.shard_size], seeds[start : start + options.shard_size], options
        )
        for number, start in enumerate(starts)
    }


def _load_teacher(
    embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorsOptions, anchor_steps: list[int]
) -> Any:
    """What computes anchors of prompts and seeds."""
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


def _shard(ask: LastLoaded, prompts: list[int], seeds: list[int], options: AnchorsOptions) -> dict[str, Any]:
    """Tensors of one shard: prompt, seed, and the anchors in the dtype of the cache."""
    import torch

    teacher, parts = ask(), []
    for start in range(0, len(prompts), options.batch_size):
        chunk = slice(start, start + options.batch_size)
        parts.append(teacher(prompts[chunk], seeds[chunk]))
    dtype = getattr(torch, options.dtype)
    latents = {name: torch.cat([part[name] for part in parts]).to(dtype) for name in parts[0]}
    return {"prompt": torch.tensor(prompts), "seed": torch.tensor(seeds), **latents}
