"""Pictures from any export: the file itself has the levels, the sampler and the text length."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, conditioned, load_backbone
from dpdmd_pipeline.backbones.options import Device, TeacherStart, resolve_device
from dpdmd_pipeline.backbones.sizes import PictureSize, size_text
from dpdmd_pipeline.backbones.student_file import check_prediction, load_header, load_weights
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import check_content
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noises_from_seeds, rollout
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.exporting.starts import Start, start_with_teacher

log = logging.getLogger(__name__)

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
    teacher_start: TeacherStart | None = None,
    size: PictureSize | None = None,
) -> Tensor:
    """Draw pictures with an exported student; picture i is `prompts[i]` from `seeds[i]`.

    Args:
        path: a diffusers folder, a ComfyUI file or a LoRA file.
        prompts, seeds: one each per picture. A picture depends on these two alone, up to rounding.
        teacher: diffusers pipeline directory of the teacher, the source of the parts that a file lacks.
        batch_size: pictures drawn at once.
        device, dtype: of the networks; everything outside them is float32.
        teacher_start: let the teacher take the first steps, for a student whose seeds look alike; needs `teacher` with
            every export. Without a guidance scale it takes that of the student's recipe.
        size: height and width in pixels; None: the first size that the student was trained at.

    Returns:
        Images in [0, 1], [B, 3, H, W] in float32 on the CPU.

    Raises:
        ValueError: if prompts and seeds differ in number, a seed is out of range, the size or the weights do not fit,
            or the file's header is incomplete.
        OSError: if a file is missing, incomplete or damaged.
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: give one seed per prompt, and at least one")
    path, teacher = Path(path), Path(teacher) if teacher else None
    if teacher_start:
        _check_start(path, teacher, teacher_start)
    source = None if teacher_start and (path / "model_index.json").is_file() else teacher  # of the text encoders
    texts = [*prompts, ""] if teacher_start else prompts  # the empty prompt guides the teacher
    cond = encode(path, source, texts, batch_size, device, dtype, size)
    student = open_student(path, source, device, dtype, size)
    start = _open_start(path, teacher, student, teacher_start, cond) if teacher_start else None
    batches = [slice(first, min(first + batch_size, len(seeds))) for first in range(0, len(seeds), batch_size)]
    latents = (draw_latents(student, {n: v[rows] for n, v in cond.items()}, seeds[rows], start) for rows in batches)
    return torch.cat([student.backbone.decode(batch).cpu() for batch in latents])


@dataclass(frozen=True)
class OpenStudent:
    """A student that can be sampled."""

    header: StudentHeader  # of its file
    backbone: Backbone  # of its family, over the pipeline with the other components
    network: nn.Module  # with its weights
    levels: NoiseLevel  # of its schedule, [N + 1]


def open_student(
    path: Path, teacher: Path | None, device: Device, dtype: Precision, size: PictureSize | None = None
) -> OpenStudent:
    """Load an export; see `sample`."""
    header = load_header(path)
    if size and size not in header.sizes:
        sizes = ", ".join(map(size_text, header.sizes))
        log.warning("%s was trained at %s, not at %s (height x width)", path, sizes, size_text(size))
    return load_onto(_backbone(path, teacher, device, dtype, size), path, header.family)


def load_onto(backbone: Backbone, path: Path, family: str) -> OpenStudent:
    """Load a student of a family, the backbone's; its weights may lie in the backbone's own folder."""
    header = load_header(path)
    check_prediction(path, header, backbone.prediction, backbone.folder)
    network = backbone.load_model()
    if backbone.folder != path:
        load_weights(path, network, family)
    levels = backbone.student_schedule(header.grid, header.num_steps)  # the same at every size
    return OpenStudent(header, backbone, network.requires_grad_(False).eval(), levels)


def encode(
    path: Path,
    teacher: Path | None,
    prompts: Sequence[str],
    batch_size: int,
    device: Device,
    dtype: Precision,
    size: PictureSize | None = None,
) -> Conditioning:
    """Encode prompts, each text once; see `sample`.

    The text encoders belong to a separate backbone, so that they are freed before the network is loaded.
    """
    texts = list(dict.fromkeys(prompts))
    backbone = _backbone(path, teacher, device, dtype, size)
    batches = [backbone.encode(texts[start : start + batch_size]) for start in range(0, len(texts), batch_size)]
    rows = torch.tensor([texts.index(prompt) for prompt in prompts], device=backbone.device)
    return {name: torch.cat([batch[name] for batch in batches])[rows] for name in batches[0]}


@torch.no_grad()
def draw_latents(student: OpenStudent, cond: Conditioning, seeds: Sequence[int], start: Start | None = None) -> Tensor:
    """Draw clean latents, [B, C, H, W] in float32; every picture has its own noise stream.

    The first draw is the initial noise; a re-noising student uses the next ones after sampling steps 1, 2, ...
    With a start, the student takes its remaining steps only.
    """
    renoises = student.header.sampler == "renoise"
    draws = noises_from_seeds(seeds, student.backbone.latent_shape, student.header.num_steps if renoises else 1)
    latents, *later = [draw.to(student.backbone.device) for draw in draws]
    # noise after the last sampling step is multiplied by sigma 0
    fresh = [*later, torch.zeros_like(latents)].__getitem__ if renoises else None
    first = start.landing if start else 0
    if start:
        latents = start.begin(cond, latents, seeds)
    denoise = conditioned(student.backbone, student.network, cond)
    return rollout(denoise, latents, student.levels[first:], fresh, first)


def _check_start(path: Path, teacher: Path | None, options: TeacherStart) -> None:
    """Refuse a start that cannot work, before anything is loaded."""
    if teacher is None:
        raise ValueError("teacher_start needs teacher=, the pipeline folder whose network takes the first steps")
    header = load_header(path)
    options.check_landing(header.num_steps)
    if options.guidance_scale is None and _teacher_guidance(header) is None:
        raise ValueError(f"{path} has no recipe with the teacher's guidance: give teacher_start a guidance_scale")


def _teacher_guidance(header: StudentHeader) -> float | None:
    """Guidance of the teacher in the student's recipe."""
    return (header.recipe or {}).get("backbone", {}).get("guidance_scale")


def _open_start(path: Path, teacher: Path, student: OpenStudent, options: TeacherStart, cond: Conditioning) -> Start:
    """Load the teacher's network; the last row of the embeddings is the empty prompt."""
    header, uncond = student.header, {name: value[-1:] for name, value in cond.items()}
    backbone = _load(header, teacher, student.backbone.device.type, student.backbone.dtype)
    backbone = backbone.at(student.backbone.sizes[0])
    check_prediction(path, header, backbone.prediction, teacher)
    network = backbone.load_model().requires_grad_(False).eval()
    return start_with_teacher(backbone, network, uncond, student.levels, options, _teacher_guidance(header))


def _backbone(path: Path, teacher: Path | None, device: Device, dtype: Precision, size: PictureSize | None) -> Backbone:
    """Adapter over the pipeline with text encoders and autoencoder: the export itself, or its teacher."""
    for folder in (path, teacher):
        if folder is not None and not folder.exists():
            raise FileNotFoundError(f"{folder} does not exist")
    is_pipeline = (path / "model_index.json").is_file()
    if is_pipeline and teacher is not None:
        raise ValueError(f"{path} is a complete pipeline: leave out teacher={teacher}")
    if not is_pipeline and teacher is None:
        raise ValueError(f"{path} holds only weights: give teacher=, the pipeline folder it was distilled from")
    header = load_header(path)
    for file in [path] if path.is_file() else path.rglob("*.safetensors"):
        check_content(file)
    for key in ("resolution", "max_sequence_length"):
        if getattr(header, key) is None:
            raise StageError(f"{path} has no dpdmd.{key} in its header", stage="export")
    backbone = _load(header, path if is_pipeline else teacher, device, getattr(torch, dtype))
    return backbone.at(size) if size else backbone


def _load(header: StudentHeader, pipeline: Path, device: Device, dtype: torch.dtype) -> Backbone:
    return load_backbone(
        header.family,
        pipeline,
        resolution=header.resolution,
        max_sequence_length=header.max_sequence_length,
        level_range=(0.02, 0.98),  # of training; not used here
        dtype=dtype,
        device=resolve_device(device),
    )
