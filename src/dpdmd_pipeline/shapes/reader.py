"""Read the attributes back from pixels: the exact judge of quality and diversity."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from dpdmd_pipeline.shapes.world import NUM_MODES, RESOLUTION, gallery

# Largest local error of a picture that still counts as legal. The embedded VAE reconstructs within 0.06; half an
# object, a second one or none gives 0.10 or more. Faults of low contrast give less: tests/shapes measures them.
VALID_BELOW = 0.10
_WINDOW = 8  # pixels; a small object fills one


class Reading(NamedTuple):
    """Readings of N pictures."""

    prompt: Tensor  # [N] int64, nearest legal prompt
    mode: Tensor  # [N] int64, nearest legal combination of the free attributes
    residual: Tensor  # [N] float32, worst local RMS error against that legal picture
    valid: Tensor  # [N] bool, residual below VALID_BELOW


def read(images: Tensor) -> Reading:
    """Find the nearest legal picture of each image, and the largest local distance to it.

    The residual is the RMS error of the worst 8x8 window, not of the whole picture: a second small object, or half an
    object less, changes only one pixel in twenty, which a mean would hide.

    Args:
        images: [N, 3, RESOLUTION, RESOLUTION] in [0, 1]; other shapes are refused.
    """
    pictures = gallery().to(images.device)
    if images.ndim != 4 or images.shape[1:] != pictures.shape[1:]:
        raise ValueError(
            f"images have shape {list(images.shape)}, the shapes world needs [N, 3, {RESOLUTION}, {RESOLUTION}]"
        )
    flat = pictures.flatten(1)
    # |x - t|^2 without the constant |x|^2, as one matrix product
    nearest = (flat.square().sum(1) - 2 * images.float().flatten(1) @ flat.T).argmin(1)
    squared = (images.float() - pictures[nearest]).square().mean(1, keepdim=True)
    residual = F.avg_pool2d(squared, _WINDOW, stride=2).amax((1, 2, 3)).sqrt()
    return Reading(nearest // NUM_MODES, nearest % NUM_MODES, residual, residual < VALID_BELOW)
