"""Sets of pictures, one per prompt: files, tensors, or rows of a cache; and the faults of single pictures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dpdmd_pipeline.scoring.decode import read_picture

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


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
