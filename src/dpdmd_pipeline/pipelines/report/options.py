"""Options of the report stage."""

from dpdmd_pipeline.bounds import Size, StrictModel


class ReportOptions(StrictModel):
    """Limits of the page."""

    max_prompts: Size  # rows of pictures in report.html; the grids next to it hold all of them
    max_strip_width: Size  # pixels of one row of one model's pictures; wider rows are scaled down
    curve_points: Size  # points of a curve in report.html; longer histories are averaged
