"""Options of the report stage."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, PositiveInt


class ReportOptions(BaseModel):
    """How much the page shows."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_prompts: PositiveInt  # rows of pictures in report.html; the grids beside it hold all
    max_strip_width: PositiveInt  # pixels of one row of one model's pictures; wider ones are made smaller
    curve_points: PositiveInt  # of a curve in report.html; longer histories are averaged
