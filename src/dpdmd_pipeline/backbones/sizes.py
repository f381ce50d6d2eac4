"""Picture sizes of a run: the spelling of `backbone.resolution`, and sizes that a network's patches divide."""

from __future__ import annotations

from typing import Any

from dpdmd_pipeline.limits import MAX_SHOWN, MAX_SIZE
from dpdmd_pipeline.wording import short

PictureSize = tuple[int, int]  # height and width in pixels
Resolution = int | list[list[int]]  # one square size, or sizes as [height, width]

MOST = 32  # sizes of one run


def check_resolution(value: Any) -> Resolution:
    """Return the sizes in their shortest spelling: a number for one square size, else a list of [height, width].

    Raises:
        ValueError: if it is no size, no list of sizes, or a list with a size twice.
    """
    pairs = [[value, value]] if type(value) is int else value
    if not isinstance(pairs, list | tuple) or not all(map(_is_size, pairs)):
        raise ValueError(
            f"{short(repr(value), MAX_SHOWN)} has no picture sizes: give a number of pixels, 1 to {MAX_SIZE}, or a "
            "list of [height, width], such as [[1024, 1024], [832, 1216]]"
        )
    if not 0 < len(pairs) <= MOST:
        raise ValueError(f"it has {len(pairs)} picture sizes: give 1 to {MOST}")
    sizes = [tuple(pair) for pair in pairs]
    if repeated := [size for number, size in enumerate(sizes) if size in sizes[:number]]:
        raise ValueError(f"it has the picture size {size_text(repeated[0])} twice: give each size once")
    if len(sizes) == 1 and len(set(sizes[0])) == 1:
        return sizes[0][0]
    return [list(size) for size in sizes]


def sizes_of(resolution: Resolution) -> list[PictureSize]:
    """The sizes that a resolution names; the first one is that of evaluation and previews."""
    pairs = [[resolution, resolution]] if isinstance(resolution, int) else resolution
    return [(height, width) for height, width in pairs]


def size_text(size: PictureSize) -> str:
    """Height and width for a message."""
    return f"{size[0]} x {size[1]}"


def check_divides(option: str, size: PictureSize, multiple: int, most: int) -> None:
    """Raise a ValueError if a side is no multiple of `multiple`, or above `most`; it names the nearest size."""
    nearest = [min(max(1, round(side / multiple)) * multiple, most // multiple * multiple) for side in size]
    if list(size) != nearest:
        limit = "" if max(size) <= most else f", at most {most}"
        raise ValueError(
            f"{option} {size_text(size)} (height x width) does not fit the teacher: both sides must be multiples of "
            f"{multiple}{limit}; the nearest size is {size_text((nearest[0], nearest[1]))}"
        )


def _is_size(pair: Any) -> bool:
    return isinstance(pair, list | tuple) and len(pair) == 2 and all(type(n) is int and 0 < n <= MAX_SIZE for n in pair)
