"""Bytes that a run writes, and the check that its disks have room for them."""

from __future__ import annotations

import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dpdmd_pipeline.backbones.base import Conditioning
from dpdmd_pipeline.planning.memory import GIB
from dpdmd_pipeline.planning.plan import TRAINED, Plan
from dpdmd_pipeline.planning.teacher import pipeline_numbers
from dpdmd_pipeline.planning.weightless import conditioning_like
from dpdmd_pipeline.publishing import Folders, folder_size, link_target
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.options import TrainOptions

log = logging.getLogger(__name__)

SMALLER = {
    "embeddings": "prompts.take with half as many prompts",
    "anchors": "half the anchors.seeds_per_prompt",
    "images": "half the evaluate.images_per_prompt",
    "pictures": "half the evaluate.images_per_prompt",
    "train_state": "train.roles=lora, or another disk for data/06_models",
}


def full_disks(plan: Plan) -> Iterator[str]:
    """One line for each disk without room for all that the run writes on it; logs sizes over 1 GiB."""
    sizes = {name: size for name, size in written_bytes(plan).items() if name in plan.folders}
    names_by_disk: dict[int, list[str]] = {}
    for name in sizes:
        names_by_disk.setdefault(_nearest_existing(plan.folders[name]).stat().st_dev, []).append(name)
    for names in names_by_disk.values():
        folder = _nearest_existing(plan.folders[names[0]])
        missing = {name: _missing_bytes(plan, name, sizes[name]) for name in names}
        needed, free = sum(missing.values()), shutil.disk_usage(folder).free
        text = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in missing.items())
        if needed > GIB:
            log.info("disk: %s; %.1f GiB are free on the disk of %s", text, free / GIB, folder)
        if needed > free:
            yield f"disk of {folder}: {text} are needed, {free / GIB:.1f} GiB are free: {_remedies(plan, missing)}"


def copies_too_large(plan: Plan) -> Iterator[str]:
    """One line for each student whose checkpoint, copied in order to be written, exceeds the machine's memory."""
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for group, options in plan.trained.items():
        if options.checkpoint_background and group not in plan.finished:
            machines = options.launch.machines if options.sharded else 1
            size = plan.estimates.checkpoint_bytes(options.recipe()) // machines
            text = f"{group}: a checkpoint is written from a copy in host memory, {size / GIB:.1f} GiB"
            if size > GIB:
                log.info("%s of %.1f GiB", text, installed / GIB)
            if size > installed:
                yield f"{text}; there are {installed / GIB:.1f} GiB: set {group}.checkpoint_background=false"


def log_export_memory(plan: Plan) -> None:
    """Log the host memory of an export: a student's network in float32 and in the export's dtype at once."""
    if plan.exported and plan.is_pretrained:
        _, network = pipeline_numbers(plan.teacher, plan.backbone.family)
        size = network * (torch.float32.itemsize + getattr(torch, plan.exported[1]).itemsize)
        installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        level = logging.WARNING if size > installed else logging.INFO
        text = "export: the student needs up to %.1f GiB of host memory, there are %.1f GiB"
        log.log(level, text, size / GIB, installed / GIB)


def written_bytes(plan: Plan) -> dict[str, int]:
    """Bytes of the large outputs, if they can be computed: caches, pictures, weights, one student's checkpoints."""
    sizes = {"teacher": plan.download}
    if plan.prompts is not None and plan.drawn:
        pictures = plan.prompts.evaluated * plan.drawn.facts["images_per_prompt"] * len(plan.drawn.evaluations)
        pixels = 3 * math.prod(plan.model.sizes[0])
        sizes["images"] = pictures * (pixels + 3 * torch.int64.itemsize)  # with model, prompt and seed
        sizes["pictures"] = pictures * pixels * plan.drawn.as_files  # at most: as files they are compressed
    if plan.prompts is not None and "embeddings" in plan.folders:
        sizes["embeddings"] = embedding_bytes(conditioning_like(plan.model), plan.prompts.total)
    if plan.prompts is not None and "anchors" in plan.folders and plan.anchors.mode == "cached":
        sizes["anchors"] = sum(
            anchor_bytes(
                plan.model.at(size).latent_shape,
                -(-math.prod(plan.anchored) // len(plan.model.sizes)),
                len(plan.anchors.anchor_levels),
                with_denoised=plan.anchors.with_denoised,
                dtype=getattr(torch, plan.anchors.dtype),
            )
            for size in plan.model.sizes
        )
    if plan.trained and "train_state" in plan.folders:
        sizes |= {TRAINED[g]: plan.estimates.student_bytes(options.recipe()) for g, options in plan.trained.items()}
        sizes["train_state"] = max(_checkpoint_bytes(plan, options) for options in plan.trained.values())
    if plan.exported and plan.is_pretrained:
        sizes["export"] = _export_bytes(plan, *plan.exported)
    return sizes


def _export_bytes(plan: Plan, formats: Sequence[str], dtype: str) -> int:
    """Weights of the whole pipeline and of the network alone, as many as there are forms of each."""
    pipeline, network = pipeline_numbers(plan.teacher, plan.backbone.family)
    numbers = pipeline * ("diffusers" in formats) + network * ("comfyui" in formats)
    if "lora" in formats and plan.train and plan.train.roles == "lora":
        numbers += plan.estimates.student_bytes(plan.train.recipe()) // torch.float32.itemsize
    return numbers * getattr(torch, dtype).itemsize


def embedding_bytes(cond: Conditioning, prompts: int) -> int:
    """Cache of embeddings: every prompt and the empty one, each like `cond`, the embeddings of one prompt."""
    return (prompts + 1) * sum(value[0].numel() * value.element_size() for value in cond.values())


def anchor_bytes(
    latent_shape: Sequence[int], samples: int, levels: int, *, with_denoised: bool, dtype: torch.dtype
) -> int:
    """Cache of anchors: prompt and seed of each sample, and its latents at each level."""
    latents = levels * (1 + with_denoised) * torch.Size(latent_shape).numel() * dtype.itemsize
    return samples * (2 * torch.int64.itemsize + latents)


def _checkpoint_bytes(plan: Plan, options: TrainOptions) -> int:
    """Bytes of a student's checkpoints: those that are kept, and the one being written."""
    return (options.keep_last + 1) * plan.estimates.checkpoint_bytes(options.recipe())


def _missing_bytes(plan: Plan, name: str, size: int) -> int:
    """Bytes still to write. The cache of another run stays beside the new one until that is complete."""
    if name == "train_state":
        return max(_missing_checkpoint_bytes(plan, group, options) for group, options in plan.trained.items())
    if name in plan.reused or any(name == TRAINED[group] for group in plan.finished):
        return 0
    if name == "teacher":
        return size
    # An unfinished cache is continued, or deleted before the first shard is written.
    return max(0, size - folder_size(Folders.of(plan.folders[name]).partial))


def _missing_checkpoint_bytes(plan: Plan, group: str, options: TrainOptions) -> int:
    folder = plan.states.get(group)
    if group in plan.finished or (folder and Checkpoints(folder).latest() == options.max_steps):
        return 0
    return max(0, _checkpoint_bytes(plan, options) - (folder_size(folder) if folder else 0))


def _remedies(plan: Plan, missing: Mapping[str, int]) -> str:
    """Options that save disk, the largest saving first."""
    phrases = []
    for name, size in sorted(missing.items(), key=lambda item: -item[1]):
        if name == "train_state":
            phrases.append(SMALLER[name])
        elif name == "embeddings" and plan.train and plan.prompts.trained > (drawn := plan.anchored[0]):
            saved = size * (1 - (plan.prompts.total - plan.prompts.trained + drawn) / plan.prompts.total)
            phrases.append(f"prompts.take={drawn}, as many as training draws anchors of, saves {saved / GIB:.1f} GiB")
        elif size and name in SMALLER:
            phrases.append(f"{SMALLER[name]} saves {size / 2 / GIB:.1f} GiB")
    if anchors := missing.get("anchors"):
        if plan.anchors.dtype == "float32":
            phrases.append(f"anchors.dtype=float16 saves {anchors / 2 / GIB:.1f} GiB")
        phrases.append(f"anchors.mode=online saves {anchors / GIB:.1f} GiB")
    return "free some space, or: " + "; ".join(phrases)


def _nearest_existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = link_target(folder)
    return next(path for path in (folder, *folder.parents) if path.exists())
