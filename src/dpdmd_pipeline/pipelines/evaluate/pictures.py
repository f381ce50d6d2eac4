"""The drawn pictures as those who look at them take them: per model a set a prompt, however the shards are cut."""

from collections.abc import Sequence
from functools import partial
from typing import Any

MODELS = ("teacher", "dmd", "dp_dmd")


def rows_of(images: Any) -> dict[tuple[int, int], list[int]]:
    """Rows of the cache by (number of the model, row of the prompt), in the order in which they were drawn."""
    found: dict[tuple[int, int], list[int]] = {}
    row = 0
    for shard in images.shards():
        for place in zip(shard["model"].tolist(), shard["prompt"].tolist(), strict=True):
            found.setdefault(place, []).append(row)
            row += 1
    return found


def picture_sets(images: Any, chosen: dict[int, str]) -> dict[str, list[Any]]:
    """Per model a set of pictures for each prompt; no picture is read before its set is measured."""
    from dpdmd_pipeline.scoring.sets import StoredSet

    rows = rows_of(images)
    read = partial(read_pictures, images)
    return {
        name: [StoredSet(str(prompt), text, tuple(rows[number, prompt]), read) for prompt, text in chosen.items()]
        for number, name in enumerate(MODELS)
    }


def read_pictures(images: Any, rows: Sequence[int]) -> Any:
    """Pictures of some rows, uint8 [n, 3, H, W]."""
    return images.rows(rows)["image"]


def pictures_by_seed(images: Any, rows: Sequence[int]) -> dict[int, Any]:
    """Pillow's pictures of some rows of one prompt and model, by seed."""
    from PIL import Image

    found = images.rows(rows)
    pixels = found["image"].permute(0, 2, 3, 1).contiguous().numpy()
    return dict(zip(found["seed"].tolist(), map(Image.fromarray, pixels), strict=True))


def draw_grid(images: Any, rows: Sequence[Sequence[int]], tile: int) -> Any:
    """Pictures side by side with a hairline between them, a line for each of `rows`.

    Args:
        images: the cache.
        rows: of one prompt each.
        tile: largest side of a picture in pixels; larger ones are made smaller, small ones enlarged without smoothing.
    """
    import torch
    from PIL import Image
    from torch.nn.functional import pad

    lines = []
    for line in rows:
        tiles = [pad(_at_most(image, tile), (0, 1, 0, 1), value=255) for image in read_pictures(images, line)]
        lines.append(torch.cat(tiles, dim=2))
    sheet = torch.cat(lines, dim=1).permute(1, 2, 0).numpy()
    scale = max(1, 640 // sheet.shape[1])
    return Image.fromarray(sheet).resize((sheet.shape[1] * scale, sheet.shape[0] * scale), Image.Resampling.NEAREST)


def _at_most(image: Any, side: int) -> Any:
    """uint8 [3, H, W] with no side above `side`."""
    import torch
    from torch.nn.functional import interpolate

    largest = max(image.shape[1:])
    if largest <= side:
        return image
    size = [max(1, round(length * side / largest)) for length in image.shape[1:]]
    return interpolate(image[None].float(), size, mode="area")[0].round().to(torch.uint8)
