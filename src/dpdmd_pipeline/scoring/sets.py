"""Sets of pictures, one per prompt: files, tensors, or rows of a cache; each unusable file has one plain reason."""

from __future__ import annotations

import struct
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

MAY_NOT_READ = "may not be read: change its mode"
# Without 16-bit and float modes, which Pillow clips to white without a warning.
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
# Pillow would try every format, whatever the name: EPS starts Ghostscript, others read more files.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_ANIMATED = {"PNG", "WEBP"}  # not JPEG: the second frame of a telephone's picture is a preview


class Fault(NamedTuple):
    """A file or prompt that a figure leaves out, with the reason."""

    kind: str
    name: str  # of a file or of a prompt


class Loaded(NamedTuple):
    """The usable pictures of one prompt, RGB, and the faults of the others."""

    names: list[str]
    images: list[Image]
    faults: list[Fault]


class PictureSet(Protocol):
    """The pictures of one prompt, from different seeds."""

    id: str
    text: str  # the id if the prompt has no text
    no_text: str  # the reason why there is no text; empty if there is one

    def __len__(self) -> int: ...  # counts unusable pictures too

    def load(self) -> Loaded: ...


@dataclass(frozen=True)
class FileSet:
    """Pictures of one prompt on disk."""

    id: str
    text: str
    files: tuple[Path, ...]  # with the suffix of a readable format
    no_text: str = ""
    unread: tuple[Path, ...] = ()  # in a format that is not read

    def __len__(self) -> int:
        return len(self.files)

    def load(self) -> Loaded:
        """Read all files; unusable ones become faults."""
        names, images = [], []
        faults = [Fault(f"{file.suffix.lower()} is not read: convert it to PNG", str(file)) for file in self.unread]
        for file in self.files:
            try:
                images.append(read_picture(file))
                names.append(str(file))
            except OSError as error:
                faults.append(Fault(str(error), str(file)))
        return Loaded(names, images, faults)


@dataclass(frozen=True)
class TensorSet:
    """Pictures of one prompt in memory: uint8 [n, 3, H, W]."""

    id: str
    text: str
    images: Tensor
    no_text: str = ""

    def __len__(self) -> int:
        return len(self.images)

    def load(self) -> Loaded:
        """Convert to Pillow images, the input of every published protocol."""
        from PIL import Image

        images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in self.images]
        return Loaded([f"{self.id}[{number}]" for number in range(len(images))], images, [])


@dataclass(frozen=True)
class StoredSet:
    """Pictures of one prompt in a cache, read only when they are measured."""

    id: str
    text: str
    rows: tuple[int, ...]  # of the cache
    read: Callable[[Sequence[int]], Tensor]  # from rows to uint8 [n, 3, H, W]
    no_text: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def load(self) -> Loaded:
        return TensorSet(self.id, self.text, self.read(self.rows)).load()


def of_one_size(loaded: Loaded) -> Loaded:
    """Drop pictures that differ from the most frequent size (the first of equals); they become faults."""
    if not loaded.images:
        return loaded
    common = Counter(image.size for image in loaded.images).most_common(1)[0][0]
    names, images, faults = [], [], list(loaded.faults)
    for name, image in zip(loaded.names, loaded.images, strict=True):
        if image.size == common:
            names.append(name)
            images.append(image)
        else:
            faults.append(Fault("another size than the prompt's other pictures", name))
    return Loaded(names, images, faults)


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
        with Image.open(path, formats=_FORMATS) as image:
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
        raise OSError("not a PNG, JPEG, WebP or BMP picture") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:  # decoders differ in their errors
        raise OSError("cut off or damaged") from error


def _upright(image: Image) -> Image:
    """Rotate or mirror as EXIF says; unreadable EXIF is ignored."""
    from PIL import ImageOps

    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow's, with lines of its code
            return ImageOps.exif_transpose(image)
    except Exception:  # also TypeError, for a tag of another type
        return image


def _on_white(image: Image) -> Image:
    """Convert to RGB over white: colours below transparent pixels are not part of the picture."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    covered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", covered.size, "white"), covered).convert("RGB")
