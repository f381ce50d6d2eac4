"""Pictures in folders, and what is wrong with them: found, named, counted, never dropped in silence.

A folder is read in one of three layouts:

    one folder per prompt   <folder>/<prompt>/<anything>.png   the text is in prompt.txt inside, else it is the name
    one file per picture    <folder>/<prompt-id>_<seed>.png    the texts come from a file of prompts, else it is the id
    a manifest              <folder>/manifest.csv or .jsonl    records with file, prompt, and if you like id
"""

from __future__ import annotations

import csv
import json
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_MANIFESTS = ("manifest.csv", "manifest.jsonl")
# 16-bit and float modes: Pillow would clip them to white without a word.
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}


class Fault(NamedTuple):
    """Something that a figure leaves out, and why."""

    kind: str
    name: str  # of a file, or of a prompt


class Loaded(NamedTuple):
    """The usable pictures of one prompt, RGB and of one size, and what was wrong with the others."""

    names: list[str]
    images: list[Image]
    faults: list[Fault]


class PictureSet(Protocol):
    """The pictures of one prompt, from different seeds."""

    id: str
    text: str

    def __len__(self) -> int: ...  # as found, usable or not

    def load(self) -> Loaded: ...


@dataclass(frozen=True)
class FileSet:
    """Pictures of one prompt, on disk."""

    id: str
    text: str
    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def load(self) -> Loaded:
        """Read all files; what cannot be used becomes a fault."""
        names, images, faults = [], [], []
        for file in self.files:
            try:
                images.append(read_picture(file))
                names.append(str(file))
            except OSError as error:
                faults.append(Fault(str(error), str(file)))
        return of_one_size(names, images, faults)


@dataclass(frozen=True)
class TensorSet:
    """Pictures of one prompt, in memory: uint8 [n, 3, H, W]."""

    id: str
    text: str
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def load(self) -> Loaded:
        """As Pillow images, which is what every published protocol starts from."""
        from PIL import Image

        images = [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in self.images]
        return Loaded([f"{self.id}[{number}]" for number in range(len(images))], images, [])


@dataclass(frozen=True)
class StoredSet:
    """Pictures of one prompt, in a cache that is read when they are measured.

    Attributes:
        id, text: of the prompt.
        rows: of the cache.
        read: from rows to uint8 [n, 3, H, W].
    """

    id: str
    text: str
    rows: tuple[int, ...]
    read: Callable[[Sequence[int]], Tensor]

    def __len__(self) -> int:
        return len(self.rows)

    def load(self) -> Loaded:
        return TensorSet(self.id, self.text, self.read(self.rows)).load()


def read_picture(path: Path) -> Image:
    """Decode one file to RGB; transparency is dropped.

    Raises:
        OSError: its text is the kind of fault, the same for all files that have it.
    """
    from PIL import Image, UnidentifiedImageError

    if not path.is_file():
        raise OSError("no such file")
    if path.stat().st_size == 0:
        raise OSError("empty file")
    try:
        with Image.open(path) as image:
            if image.mode not in _READABLE:
                raise OSError(f"pixel format {image.mode}: convert it to 8 bits")
            return image.convert("RGB")
    except (UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise OSError("not a picture") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:  # decoders differ in what they raise
        if str(error).startswith("pixel format"):
            raise
        raise OSError("cut off or damaged") from error


def of_one_size(names: list[str], images: list[Image], faults: list[Fault]) -> Loaded:
    """Keep the pictures of the size that most have (of a draw, the first); the others are faults."""
    if not images:
        return Loaded([], [], faults)
    common = Counter(image.size for image in images).most_common(1)[0][0]
    kept = [(name, image) for name, image in zip(names, images, strict=True) if image.size == common]
    kind = "another size than the prompt's other pictures"
    other = [Fault(kind, name) for name, image in zip(names, images, strict=True) if image.size != common]
    return Loaded([name for name, _ in kept], [image for _, image in kept], [*faults, *other])


def find_pictures(folder: Path, prompts: Path | None = None) -> tuple[list[FileSet], list[str]]:
    """The sets of a folder in one of the three layouts, and the files that are no pictures.

    Args:
        folder: of pictures.
        prompts: texts of the prompt ids: .txt (line i is id i, from 0), or .csv or .jsonl with id and text.

    Raises:
        ValueError: if the layout cannot be told, or a name in it says nothing.
        OSError: if there is no such folder, or no picture in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder of pictures")
    texts = read_texts(prompts) if prompts else {}
    manifest = next((folder / name for name in _MANIFESTS if (folder / name).is_file()), None)
    if manifest:
        return _from_manifest(manifest), []
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    flat = [path for path in entries if _is_picture(path)]
    rooms = [path for path in entries if path.is_dir() and any(map(_is_picture, path.iterdir()))]
    if flat and rooms:
        raise ValueError(
            f"{folder} has pictures beside folders of pictures ({flat[0].name}, {rooms[0].name}/): use one layout"
        )
    if not flat and not rooms:
        raise OSError(f"{folder} has no picture ({', '.join(sorted(SUFFIXES))}) and no folder of them")
    taken = set(flat) | set(rooms)
    rest = [path.name for path in entries if path not in taken]
    if flat:
        return _from_names(flat, texts), rest
    rest += [f"{room.name}/{path.name}" for room in rooms for path in sorted(room.iterdir()) if _is_stray(path)]
    return [_from_room(room, texts) for room in rooms], rest


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and path.is_file()


def _is_stray(path: Path) -> bool:
    return not _is_picture(path) and path.name != "prompt.txt" and not path.name.startswith(".")


def _from_room(room: Path, texts: dict[str, str]) -> FileSet:
    note = room / "prompt.txt"
    text = note.read_text(encoding="utf-8").strip() if note.is_file() else texts.get(room.name, room.name)
    return FileSet(room.name, text, tuple(sorted(filter(_is_picture, room.iterdir()), key=_by_number)))


def _from_names(files: Sequence[Path], texts: dict[str, str]) -> list[FileSet]:
    """`<prompt-id>_<seed>.png`; the id may have underscores itself."""
    groups: dict[str, list[Path]] = {}
    for file in files:
        found = re.fullmatch(r"(.+)_(\d+)_?", file.stem)
        if not found:
            raise ValueError(f"{file} is not named <prompt-id>_<seed>: rename it, or describe it in manifest.csv")
        groups.setdefault(found[1], []).append(file)
    return [
        FileSet(name, texts.get(name, name), tuple(sorted(group, key=_by_number))) for name, group in groups.items()
    ]


def _by_number(path: Path) -> list[int | str]:
    """Order in which 10 comes after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _from_manifest(manifest: Path) -> list[FileSet]:
    groups: dict[str, tuple[str, list[Path]]] = {}
    for line, record in enumerate(_records(manifest), start=1):
        absent = [key for key in ("file", "prompt") if not record.get(key)]
        if absent:
            raise ValueError(f"{manifest}, record {line} has no {' and no '.join(absent)}: give both")
        text = str(record["prompt"])
        known, files = groups.setdefault(str(record.get("id") or text), (text, []))
        if known != text:
            raise ValueError(f"{manifest}, record {line}: id {record['id']} has two prompts, {known!r} and {text!r}")
        files.append(manifest.parent / str(record["file"]))
    if not groups:
        raise ValueError(f"{manifest} is empty: name one picture per record")
    return [FileSet(name, text, tuple(files)) for name, (text, files) in groups.items()]


def _records(path: Path) -> Iterable[dict]:
    """Records of a .csv or .jsonl file."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix == ".csv":
            yield from csv.DictReader(file)
            return
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line) if line.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
            if isinstance(record, dict):
                yield record
            elif record is not None:
                raise ValueError(f"{path}, line {number} is not a JSON object")


def read_texts(path: Path) -> dict[str, str]:
    """Prompt ids to texts.

    Raises:
        ValueError: for another ending than .txt, .csv, .jsonl, or a record without id and text.
    """
    path = Path(path)
    if path.suffix == ".txt":
        lines = path.read_text(encoding="utf-8").splitlines()
        return {str(number): line.strip() for number, line in enumerate(lines) if line.strip()}
    if path.suffix not in {".csv", ".jsonl"}:
        raise ValueError(f"{path}: prompts are read from .txt, .csv or .jsonl")
    texts = {}
    for line, record in enumerate(_records(path), start=1):
        if record.get("id") in (None, "") or not record.get("text"):
            raise ValueError(f"{path}, record {line} lacks id or text: give both")
        texts[str(record["id"])] = str(record["text"])
    return texts


def read_parts(path: Path) -> dict[str, dict]:
    """GenEval's records by text of their prompt.

    Raises:
        ValueError: for a record without a prompt.
    """
    records = list(_records(Path(path)))
    for line, record in enumerate(records, start=1):
        if not record.get("prompt"):
            raise ValueError(f"{path}, record {line} has no prompt: it is not GenEval's evaluation_metadata.jsonl")
    return {record["prompt"]: record for record in records}
