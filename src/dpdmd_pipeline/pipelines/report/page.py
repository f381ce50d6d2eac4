"""Fill the templates of the page, and cut the grids into the rows of pictures that it shows."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines.report.options import ReportOptions
from dpdmd_pipeline.wording import COLOURS

FILES = ("metrics.json", "scores.json", "summary.json", "train_history.json")
FILES += ("train_history_dmd.json", "train_curve.png", "train_strip.png", "grid_teacher.png", "grid_dmd.png")
FILES += ("grid_dp_dmd.png",)  # in the folder of the page


def render(template: str, page: dict[str, Any]) -> str:
    """Fill a template of this folder; HTML templates escape their values, Markdown templates use the filter `md`."""
    from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=PackageLoader("dpdmd_pipeline.pipelines.report", "."),
        autoescape=select_autoescape(enabled_extensions=("html.j2",), default=False),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["md"] = escape_markdown
    environment.globals |= {"colours": COLOURS, "files": FILES}
    return environment.get_template(template).render(page)


def escape_markdown(text: str) -> str:
    """Escape text so that Markdown shows it unchanged in a paragraph, a list or a table cell."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*_\[\]{}|~$#!])", r"\\\1", text)
    return re.sub(r"^(\d+)([.)])(?=\s|$)|^([-+])(?=\s|$)", lambda m: f"{m[1] or ''}\\{m[2] or m[3]}", text)


def picture_rows(
    grids: Mapping[str, Any], texts: Sequence[str], options: ReportOptions
) -> list[tuple[str, dict[str, str]]]:
    """One row per shown prompt: its text, and each model's pictures as a data URI."""
    strips = [_cut_strips(model, grid, len(texts), options) for model, grid in grids.items()]
    return [(text, dict(zip(grids, row, strict=True))) for text, *row in zip(texts, *strips, strict=False)]


def _cut_strips(model: str, grid: Any, num_prompts: int, options: ReportOptions) -> list[str]:
    """Cut the first rows of a grid, each as a data URI of a PNG."""
    if not num_prompts or grid.height % num_prompts:
        raise StageError(
            f"grid_{model} is {grid.height} pixels high and cannot show {num_prompts} evaluation prompts in equal rows",
            stage="evaluate",
        )
    height = grid.height // num_prompts
    rows = range(min(num_prompts, options.max_prompts))
    return [data_uri(grid.crop((0, row * height, grid.width, (row + 1) * height)), options) for row in rows]


def data_uri(image: Any, options: ReportOptions) -> str:
    """A picture as a data URI of a PNG, no wider than the page shows it."""
    from PIL import Image

    if image.width > options.max_strip_width:
        size = options.max_strip_width, max(1, round(image.height * options.max_strip_width / image.width))
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
