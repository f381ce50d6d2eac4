"""Anchors shard by shard. The identity of a cache hashes this module and everything that it imports."""

from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.backbones.sizes import PictureSize
from dpdmd_pipeline.datasets.sharded import LastLoaded
from dpdmd_pipeline.training.recipe import AnchorRecipe

Sample = tuple[int, int]  # row of the prompt in the embeddings, seed


def samples_by_size(rows: list[int], sizes: int, seeds_per_prompt: int, seed: int) -> list[list[Sample]]:
    """Share all samples among picture sizes; prompts take turns at them, and so do the seeds of a prompt."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    parts: list[list[Sample]] = [[] for _ in range(sizes)]
    for number, noise_seed in enumerate(sample_seeds(seed, "anchors", 0, len(rows) * seeds_per_prompt)):
        turn, place = divmod(number, len(rows))
        parts[(turn + place) % sizes].append((rows[place], noise_seed))
    if not all(parts):
        raise ValueError(
            f"backbone.resolution has {sizes} picture sizes, {len(rows)} prompts x {seeds_per_prompt} seeds do not "
            "reach all of them: raise anchors.seeds_per_prompt, or name fewer sizes"
        )
    return parts


def make_shards(
    load: LastLoaded, sizes: list[PictureSize], parts: list[list[Sample]], options: AnchorRecipe
) -> dict[str, Any]:
    """Make one thunk per shard, size after size; the first one loads the teacher."""
    shards = {}
    for size, samples in zip(sizes, parts, strict=True):
        for start in range(0, len(samples), options.shard_size):
            shard = samples[start : start + options.shard_size]
            shards[f"{len(shards):05d}"] = partial(_shard, load, size, shard, options)
    return shards


def load_teacher(
    embeddings: Any, teacher: Path, backbone: BackboneOptions, options: AnchorRecipe, anchor_steps: list[int]
) -> Any:
    """Load the teacher as a function of prompts and seeds."""
    from dpdmd_pipeline.training.anchors import TeacherAnchors

    model = backbone.load_teacher(teacher, options.device)
    return TeacherAnchors(
        model,
        model.load_model(),
        embeddings,
        num_steps=backbone.num_steps,
        guidance_scale=backbone.guidance_scale,
        anchor_steps=anchor_steps,
        with_denoised=options.with_denoised,
    )


def _shard(load: LastLoaded, size: PictureSize, samples: list[Sample], options: AnchorRecipe) -> dict[str, Any]:
    """Compute one shard: prompt, seed, and the anchors in the dtype of the cache."""
    import torch

    teacher, batches = load().at(size), []
    prompts, seeds = zip(*samples, strict=True)
    for start in range(0, len(prompts), options.batch_size):
        chunk = slice(start, start + options.batch_size)
        batches.append({name: value.cpu() for name, value in teacher(prompts[chunk], seeds[chunk]).items()})
    dtype = getattr(torch, options.dtype)
    latents = {name: torch.cat([batch[name] for batch in batches]).to(dtype) for name in batches[0]}
    return {"prompt": torch.tensor(prompts), "seed": torch.tensor(seeds), **latents}
