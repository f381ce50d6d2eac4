"""Pictures from any export: the levels, the sampler and the text length are read from the file itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, conditioned, load_backbone
from dpdmd_pipeline.backbones.options import Device, resolve_device
from dpdmd_pipeline.backbones.student_file import load_header, load_weights
from dpdmd_pipeline.backbones.student_header import StudentHeader, check_prediction
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noises_from_seeds, rollout

Precision = Literal["float32", "bfloat16", "float16"]


def sample(
    path: Path | str,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    teacher: Path | str | None = None,
    batch_size: int = 8,
    device: Device = "auto",
    dtype: Precision = "float32",
) -> Tensor:
    """Draw pictures with an exported student, as its file says; picture i is `prompts[i]` from `seeds[i]`.

    Args:
        path: a diffusers folder, a ComfyUI file or a LoRA file.
        prompts, seeds: one each per picture. A picture depends on its own two alone, to rounding.
        teacher: diffusers pipeline directory of the teacher, for a file: it brings text encoders, autoencoder
            and, for a LoRA, the network. A diffusers folder has all of it.
        batch_size: pictures drawn at once.
        device: auto, cpu or cuda.
        dtype: of the networks; everything outside them is float32.

    Returns:
        Images in [0, 1], [B, 3, H, W] in float32 on the CPU.

    Raises:
        ValueError: if prompts and seeds are not as many, a seed is out of range, the weights do not fit, or the
            file does not tell how it is sampled.
        OSError: if a file is missing or torn.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt, and at least one")
    place, parts = Path(path), Path(teacher) if teacher else None
    cond = encode(place, parts, prompts, batch_size, device, dtype)
    student = open_student(place, parts, device, dtype)
    images = []
    for start in range(0, len(seeds), batch_size):
        rows = slice(start, start + batch_size)
        latents = draw_latents(student, {name: value[rows] for name, value in cond.items()}, seeds[rows])
        images.append(student.backbone.decode(latents).cpu())
    return torch.cat(images)


@dataclass(frozen=True)
class OpenStudent:
    """A student that can be sampled.

    Attributes:
        header: what its file says.
        backbone: of its family, over the pipeline that brings the other parts.
        network: with its weights.
        levels: of its schedule, [N + 1].
    """

    header: StudentHeader
    backbone: Backbone
    network: nn.Module
    levels: NoiseLevel


def open_student(path: Path, teacher: Path | None, device: Device, dtype: Precision) -> OpenStudent:
    """Load an export; see `sample`."""
    header = load_header(path)
    parts = _parts(path, teacher)
    backbone = _backbone(path, parts, header, device, dtype)
    check_prediction(path, header, backbone.prediction, parts)
    network = backbone.load_model()
    if parts != path:
        load_weights(path, network, header.family)
    levels = backbone.student_schedule(header.grid, header.num_steps)
    return OpenStudent(header, backbone, network.requires_grad_(False).eval(), levels)


def encode(
    path: Path, teacher: Path | None, prompts: Sequence[str], batch_size: int, device: Device, dtype: Precision
) -> Conditioning:
    """Embeddings of prompts, each text encoded once; see `sample`.

    The text encoders are those of a backbone of its own, so that they are freed before the network is loaded.
    """
    texts = list(dict.fromkeys(prompts))
    backbone = _backbone(path, _parts(path, teacher), load_header(path), device, dtype)
    encoded = [backbone.encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=backbone.device)
    return {name: torch.cat([part[name] for part in encoded])[rows] for name in encoded[0]}


@torch.no_grad()
def draw_latents(student: OpenStudent, cond: Conditioning, seeds: Sequence[int]) -> Tensor:
    """Clean latents, [B, C, H, W] in float32; every picture has a noise stream of its own.

    Its first draw is the start; a re-noising student takes the next ones after steps 1, 2, ...
    """
    renoises = student.header.sampler == "renoise"
    draws = noises_from_seeds(seeds, student.backbone.latent_shape, student.header.num_steps if renoises else 1)
    start, *later = [draw.to(student.backbone.device) for draw in draws]
    # what comes after the last step is multiplied by its sigma, which is 0
    fresh = partial(_after, [*later, torch.zeros_like(start)]) if renoises else None
    return rollout(conditioned(student.backbone, student.network, cond), start, student.levels, fresh)


def _after(noises: Sequence[Tensor], step: int) -> Tensor:
    return noises[step]


def _parts(path: Path, teacher: Path | None) -> Path:
    """The pipeline folder that brings text encoders and autoencoder."""
    for given in (path, teacher):
        if given is not None and not given.exists():
            raise FileNotFoundError(f"{given} does not exist")
    is_pipeline = (path / "model_index.json").is_file()
    if is_pipeline and teacher is not None:
        raise ValueError(f"{path} is a whole pipeline: leave teacher={teacher} out")
    if not is_pipeline and teacher is None:
        raise ValueError(f"{path} holds weights alone: give teacher=, the pipeline folder it was distilled from")
    return path if is_pipeline else teacher


def _backbone(path: Path, parts: Path, header: StudentHeader, device: Device, dtype: Precision) -> Backbone:
    for key in ("resolution", "max_sequence_length"):
        if getattr(header, key) is None:
            raise ValueError(f"{path} does not tell dpdmd.{key}: give a file that `kedro run --pipelines export` wrote")
    return load_backbone(
        header.family,
        parts,
        resolution=header.resolution,
        max_sequence_length=header.max_sequence_length,
        level_range=(0.02, 0.98),  # of training; nothing is drawn from it here
        dtype=getattr(torch, dtype),
        device=resolve_device(device),
    )
