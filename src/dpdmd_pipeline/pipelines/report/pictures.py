"""Cut the grids into rows and embed them in the page."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines.report.options import ReportOptions


def picture_rows(
    grids: Mapping[str, Any], texts: Sequence[str], options: ReportOptions
) -> list[tuple[str, dict[str, str]]]:
    """One row per shown prompt: its text, and each model's pictures as a data URI.

    Raises:
        StageError: see `cut_strips`.
    """
    strips = [cut_strips(model, grid, len(texts), options) for model, grid in grids.items()]
    return [(text, dict(zip(grids, row, strict=True))) for text, *row in zip(texts, *strips, strict=False)]


def cut_strips(model: str, grid: Any, num_prompts: int, options: ReportOptions) -> list[str]:
    """Cut the first rows of a grid, each as a data URI of a PNG.

    Raises:
        StageError: if the grid's height is not a multiple of the number of prompts.
    """
    if not num_prompts or grid.height % num_prompts:
        raise StageError(
            f"grid_{model} is {grid.height} pixels high and cannot show {num_prompts} evaluation prompts in equal rows",
            stage="evaluate",
        )
    height = grid.height // num_prompts
    rows = range(min(num_prompts, options.max_prompts))
    return [_data_uri(grid.crop((0, row * height, grid.width, (row + 1) * height)), options) for row in rows]


def _data_uri(image: Any, options: ReportOptions) -> str:
    from PIL import Image

    if image.width > options.max_strip_width:
        size = options.max_strip_width, max(1, round(image.height * options.max_strip_width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
