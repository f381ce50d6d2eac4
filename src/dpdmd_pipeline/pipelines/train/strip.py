"""Both students over their training in one picture: a row for each measurement, the same prompts and seeds in each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpdmd_pipeline.training.preview import FOLDER

ROWS = 10  # most rows of a student
LABEL, LINE, GAP = 72, 20, 4  # pixels: width of the labels, height of the heads, between rows and students
NOTE = "no pictures were kept: train.previews and train.watch.every choose them"


def draw_strip(student_dmd: Path, student: Path) -> Any:
    """Draw the pictures that DMD's and DP-DMD's students made while they trained; the first row is the teacher's."""
    from PIL import Image, ImageDraw

    rows = {name: _rows(folder) for name, folder in (("DMD", student_dmd), ("DP-DMD", student))}
    pictures = [picture for row in rows.values() for picture in row.values()]
    if not pictures:
        strip = Image.new("RGB", (640, LINE), "white")
        ImageDraw.Draw(strip).text((GAP, GAP), NOTE, "black")
        return strip
    width, height = (max(getattr(picture, side) for picture in pictures) + GAP for side in ("width", "height"))
    count = max(map(len, rows.values()))
    strip = Image.new("RGB", (LABEL + width * len(rows), LINE + height * count), "white")
    draw = ImageDraw.Draw(strip)
    for column, (name, row) in enumerate(rows.items()):
        start = LABEL + column * width
        draw.text((start, GAP), name, "black")
        for line, (cycle, picture) in enumerate(row.items()):
            top = LINE + line * height
            draw.text((GAP, top + height // 2 - 8), f"cycle {cycle}" if cycle else "teacher", "black")
            strip.paste(picture, (start, top))
    return strip


def _rows(student: Path) -> dict[int, Any]:
    """Pictures in a student's folder by cycle, evenly spread if there are too many; first and last are kept."""
    from PIL import Image

    paths = sorted((student / FOLDER).glob("*.png"))
    if len(paths) > ROWS:
        paths = [paths[number * (len(paths) - 1) // (ROWS - 1)] for number in range(ROWS)]
    rows = {}
    for path in paths:
        with Image.open(path, formats=["PNG"]) as picture:
            rows[int(path.stem)] = picture.convert("RGB")
    return rows
