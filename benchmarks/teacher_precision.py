"""Error of a teacher's anchors and targets in 16 bits, against float32, on the embedded teachers.

python benchmarks/teacher_precision.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import timing
from dpdmd_pipeline.backbones.base import guided, load_backbone
from dpdmd_pipeline.dpdmd.anchor import teacher_anchors
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds
from record import ROOT, record

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow star"]
STEPS = 5  # K
# family -> folder, sampling steps, guidance scale
TEACHERS = {"sdxl": ("shapes_sdxl_teacher", 40, 8.0), "sd3": ("shapes_teacher", 30, 3.5)}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def main(args: argparse.Namespace) -> None:
    """Compare the dtypes of each teacher."""
    errors = {}
    for family, (name, num_steps, scale) in TEACHERS.items():
        exact, *rounded = (
            anchors(family, ROOT / "data/06_models" / name, num_steps, scale, dtype, args.samples) for dtype in DTYPES
        )
        for dtype, tensors in zip(DTYPES[1:], rounded, strict=True):
            for part, ours, theirs in zip(("anchor", "x0 at the anchor"), tensors, exact, strict=True):
                errors[f"{family}, {dtype}".replace("torch.", "") + f": {part}"] = relative_error(ours, theirs)
    record("teacher_precision", {"relative RMS error": errors, "samples": args.samples, **timing.conditions()})


@torch.no_grad()
def anchors(family: str, folder: Path, num_steps: int, scale: float, dtype: torch.dtype, samples: int) -> list[Tensor]:
    """The teacher's latents after K steps, and its x0 there, from the same noise and embeddings for every dtype."""
    options = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98)}
    cond = load_backbone(family, folder, **options).encode([*PROMPTS, ""])
    rows = torch.arange(samples) % len(PROMPTS)
    backbone = load_backbone(family, folder, dtype=dtype, **options)
    batch, uncond = ({name: value[index] for name, value in cond.items()} for index in (rows, [-1]))
    teacher = guided(backbone, backbone.load_model(), batch, uncond, scale)
    levels = backbone.schedule(num_steps)
    (anchor,) = teacher_anchors(teacher, noise_from_seeds(range(samples), backbone.latent_shape), levels, [STEPS])
    return [anchor, teacher(anchor, levels[STEPS])]


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).square().mean() / theirs.square().mean()).sqrt().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=16)
    main(parser.parse_args())
