"""Anchors shard by shard. The identity of a cache hashes this module and everything that it imports."""

from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import LastLoaded
from dpdmd_pipeline.training.recipe import AnchorRecipe


def make_shards(load: LastLoaded, samples: list[int], options: AnchorRecipe) -> dict[str, Any]:
    """Make one thunk per shard, of samples given by their prompts' rows; the first one loads the teacher."""
    from dpdmd_pipeline.dpdmd.sampling import sample_seeds

    seeds = sample_seeds(options.seed, "anchors", 0, len(samples))
    shards = {}
    for start in range(0, len(samples), options.shard_size):
        shard = slice(start, start + options.shard_size)
        shards[f"{len(shards):05d}"] = partial(_shard, load, samples[shard], seeds[shard], options)
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


def _shard(load: LastLoaded, prompts: list[int], seeds: list[int], options: AnchorRecipe) -> dict[str, Any]:
    """Compute one shard: prompt, seed, and the anchors in the dtype of the cache."""
    import torch

    teacher, batches = load(), []
    for start in range(0, len(prompts), options.batch_size):
        chunk = slice(start, start + options.batch_size)
        batches.append({name: value.cpu() for name, value in teacher(prompts[chunk], seeds[chunk]).items()})
    dtype = getattr(torch, options.dtype)
    latents = {name: torch.cat([batch[name] for batch in batches]).to(dtype) for name in batches[0]}
    return {"prompt": torch.tensor(prompts), "seed": torch.tensor(seeds), **latents}
