"""Rows of the grids as pictures that lie in the page itself."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.pipelines.report.options import ReportOptions


def picture_rows(
    grids: Mapping[str, Any], texts: Sequence[str], options: ReportOptions
) -> list[tuple[str, dict[str, str]]]:
    """A row per prompt, as many as are shown: its text, and each model's pictures of it as a data URI.

    Raises:
        ValueError: see `cut_strips`.
    """
    strips = [cut_strips(model, grid, len(texts), options) for model, grid in grids.items()]
    return [(text, dict(zip(grids, row, strict=True))) for text, *row in zip(texts, *strips, strict=False)]


def cut_strips(model: str, grid: Any, num_prompts: int, options: ReportOptions) -> list[str]:
    """The first rows of a grid, each as a data URI of a PNG.

    Raises:
        ValueError: if the grid's height is no multiple of the number of prompts.
    """
    if not num_prompts or grid.height % num_prompts:
        raise ValueError(
            f"grid_{model} is {grid.height} pixels high and cannot show {num_prompts} evaluation prompts, one a row: "
            "run `kedro run --pipelines evaluate` again"
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
