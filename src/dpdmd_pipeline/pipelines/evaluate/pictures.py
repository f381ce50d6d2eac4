"""Read the drawn pictures from the cache: as sets for the metrics, as files, and as grids."""

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

from dpdmd_pipeline.wording import grouped

MODELS = ("teacher", "dmd", "dp_dmd")
STARTED = "dmd_start"  # the DMD student with evaluate.teacher_start


def cache_rows(images: Any) -> dict[tuple[int, int], list[int]]:
    """Rows of the cache by (model number, prompt row), in drawing order."""
    shards = images.shards()
    keys = (key for shard in shards for key in zip(shard["model"].tolist(), shard["prompt"].tolist(), strict=True))
    return grouped((key, row) for row, key in enumerate(keys))


def picture_sets(images: Any, chosen: dict[int, str]) -> dict[str, list[Any]]:
    """One set of pictures per prompt, by model; a set reads its pictures when it is measured."""
    from dpdmd_pipeline.scoring.sets import StoredSet

    rows = cache_rows(images)
    read = partial(_read, images)
    return {
        name: [StoredSet(str(prompt), text, tuple(rows[number, prompt]), read) for prompt, text in chosen.items()]
        for number, name in enumerate(images.manifest["models"])
    }


def _read(images: Any, rows: Sequence[int]) -> Any:
    """Pictures of some rows, uint8 [n, 3, H, W]."""
    return images.rows(rows)["image"]


def pictures_by_seed(images: Any, rows: Sequence[int]) -> dict[int, Any]:
    """Pillow images of some rows of one prompt and model, by seed."""
    from PIL import Image

    stored = images.rows(rows)
    pixels = stored["image"].permute(0, 2, 3, 1).contiguous().numpy()
    return dict(zip(stored["seed"].tolist(), map(Image.fromarray, pixels), strict=True))


def draw_grid(images: Any, rows: Sequence[Sequence[int]], tile: int) -> Any:
    """Grid of pictures with a white hairline between them; small grids are enlarged without smoothing.

    Args:
        rows: cache rows of each line of the grid.
        tile: largest side of a picture in pixels; larger pictures are scaled down.
    """
    from PIL import Image

    lines = [[*pictures_by_seed(images, line).values()] for line in rows]
    for picture in chain.from_iterable(lines):
        picture.thumbnail((tile, tile), Image.Resampling.BOX)
    width, height = lines[0][0].width + 1, lines[0][0].height + 1
    sheet = Image.new("RGB", (width * len(lines[0]), height * len(lines)), "white")
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            sheet.paste(picture, (width * column, height * row))
    scale = max(1, 640 // sheet.width)
    return sheet.resize((sheet.width * scale, sheet.height * scale), Image.Resampling.NEAREST)
