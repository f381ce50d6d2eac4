"""Small pictures of a student while it trains: the watched prompts and seeds, one row for each measurement."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpdmd_pipeline.publishing import write_atomically, writing

if TYPE_CHECKING:
    from dpdmd_pipeline.backbones.base import Backbone

FOLDER = "previews"  # in a run's folder of checkpoints, and in its student's folder
SEEDS = 4  # pictures of a prompt
SIZE = 128  # most pixels along a side of a picture


@torch.no_grad()
def decode_row(backbone: Backbone, by_prompt: Tensor) -> Tensor:
    """Decode latents [prompts, seeds, C, H, W] side by side, as 8-bit numbers [h, w, 3] on the CPU.

    One picture after the other: the decoder of a large model needs more memory than the picture.
    """
    pictures = []
    for latents in by_prompt[:, :SEEDS].flatten(0, 1).split(1):
        picture = backbone.decode(latents)
        if picture.shape[-1] > SIZE:
            size = SIZE * picture.shape[-2] // picture.shape[-1], SIZE
            picture = torch.nn.functional.interpolate(picture, size, mode="area")
        pictures.append(picture[0].cpu())
    return (torch.cat(pictures, dim=2) * 255).round().byte().permute(1, 2, 0)


def preview_path(folder: Path, cycle: int) -> Path:
    """File with the row after a cycle, below a run's or a student's folder; cycle 0 is the teacher's."""
    return folder / FOLDER / f"{cycle:07d}.png"


def save_row(folder: Path, cycle: int, row: Tensor) -> None:
    """Write one row as a PNG."""
    from PIL import Image

    path = preview_path(folder, cycle)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, partial(Image.fromarray(row.numpy()).save, format="PNG"))
