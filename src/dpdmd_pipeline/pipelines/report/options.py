"""Options of the report stage."""

from pydantic import BaseModel, ConfigDict, PositiveInt


class ReportOptions(BaseModel):
    """Limits of the page."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    max_prompts: PositiveInt  # rows of pictures in report.html; the grids next to it hold all of them
    max_strip_width: PositiveInt  # pixels of one row of one model's pictures; wider rows are scaled down
    curve_points: PositiveInt  # points of a curve in report.html; longer histories are averaged
