"""A sheet of labelled pictures, and one number for how much they differ. torch, and Pillow inside a function."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = 320  # pixels of a tile's longer side
_LABEL = 28  # pixels below a tile


def shrink(images: Tensor) -> Tensor:
    """Pictures [N, H, W, 3] as tiles with a longer side of at most TILE; small ones as they are."""
    scale = TILE / max(images.shape[1:3])
    if scale >= 1:
        return images
    return F.interpolate(images.movedim(-1, 1), scale_factor=scale, mode="area").movedim(1, -1)


def make_sheet(tiles: Tensor, labels: Sequence[str], columns: int | None = None) -> Tensor:
    """All tiles [N, H, W, 3] on one white picture [1, H, W, 3], each with a label below it.

    Args:
        columns: tiles in a row; as many as rows if None.
    """
    from PIL import Image, ImageDraw

    count, height, width, _ = tiles.shape
    columns = columns or math.ceil(count**0.5)
    sheet = Image.new("RGB", (columns * width, math.ceil(count / columns) * (height + _LABEL)), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (tile, label) in enumerate(zip(tiles, labels, strict=True)):
        x, y = index % columns * width, index // columns * (height + _LABEL)
        pixels = (tile.clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
        sheet.paste(Image.frombytes("RGB", (width, height), pixels.cpu().numpy().tobytes()), (x, y))
        draw.text((x + 4, y + height + 8), label, fill="black")
    pixels = torch.frombuffer(bytearray(sheet.tobytes()), dtype=torch.uint8)
    return pixels.view(1, sheet.height, sheet.width, 3).float() / 255


def mean_distance(latents: Tensor) -> float:
    """Mean distance between the pictures of a batch [N, ...], in units of their standard deviation.

    A pair's distance is the root mean square of its differences. 0: all are the same. About 1.4: they have as little
    in common as noise.

    Raises:
        ValueError: for fewer than two pictures, or values that are not finite.
    """
    rows = latents.flatten(1).double()
    if len(rows) < 2:
        raise ValueError(f"the batch has {len(rows)} picture: a distance needs two or more")
    if not bool(rows.isfinite().all()):
        raise ValueError("the latents hold values that are not finite: lower the guidance, or use another precision")
    distances = F.pdist(rows) / rows.shape[1] ** 0.5
    return (distances.mean() / rows.std(correction=0).clamp(min=1e-12)).item()
