"""Decode a picture file to RGB, with one plain reason for each kind of unusable file."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

MAY_NOT_READ = "may not be read: change its mode"
# Without 16-bit and float modes, which Pillow clips to white without a warning.
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_ANIMATED = {"PNG", "WEBP"}  # not JPEG: the second frame of a telephone's picture is a preview


class _UnusableError(OSError):
    """A picture with a clear reason not to use it."""


def read_picture(path: Path) -> Image:
    """Decode one file to RGB as a viewer shows it: rotated by its EXIF, with transparent pixels white.

    Raises:
        OSError: with the kind of fault, without the file's name.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if path.is_dir():
            raise _UnusableError("a folder, not a picture")
        if not path.is_file():
            raise _UnusableError("no such file")
        if path.stat().st_size == 0:
            raise _UnusableError("empty file")
        with Image.open(path) as image:
            if image.mode not in _READABLE:
                raise _UnusableError(f"pixel format {image.mode}: convert it to 8 bits")
            if getattr(image, "n_frames", 1) > 1 and image.format in _ANIMATED:
                raise _UnusableError("animated: save one frame as the picture")
            image.load()
            return _on_white(_upright(image))
    except _UnusableError:
        raise
    except PermissionError as error:
        raise OSError(MAY_NOT_READ) from error
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise OSError(f"more than {limit} million pixels: scale it down") from error
    except (UnidentifiedImageError, ValueError) as error:
        raise OSError("not a picture") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:  # decoders differ in their errors
        raise OSError("cut off or damaged") from error


def _upright(image: Image) -> Image:
    """Rotate or mirror as EXIF says; unreadable EXIF is ignored."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, SyntaxError, EOFError, struct.error):
        return image


def _on_white(image: Image) -> Image:
    """Convert to RGB over white: colours below transparent pixels are not part of the picture."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    covered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", covered.size, "white"), covered).convert("RGB")
