"""Pictures in folders, and what is wrong with them: found, named, counted, never dropped in silence.

A folder is read in one of three layouts:

    one folder per prompt   <folder>/<prompt>/<anything>.png   the text is in prompt.txt inside, else in a file of
                                                               prompts, else it is the name, unless that is an id
    one file per picture    <folder>/<prompt-id>_<seed>.png    the text is in a file of prompts, else it is the id, if
                                                               that has a space
    a manifest              <folder>/manifest.csv or .jsonl    records with file, prompt, and if you like id

A folder per prompt may also be GenEval's: <folder>/00000/samples/0000.png, the text in 00000/metadata.jsonl.

A folder's name is an id where it has digits and no space: 00000, p7, prompt_12.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from dpdmd_pipeline.wording import listed

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Pictures too, but of several frames, of more than 8 bits, or not for every Pillow.
_UNREAD = {".avif", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"}
_MANIFESTS = ("manifest.csv", "manifest.jsonl")
_GENEVAL = "metadata.jsonl"
_ID_AND_SEED = re.compile(r"(.+)_(\d+)_?")
_SEEDS_AT_MOST = 100  # of one prompt alone, in a folder that may be of real pictures
# 16-bit and float modes: Pillow would clip them to white without a word.
_READABLE = {"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"}
_MOVING = {"PNG", "WEBP"}  # and not a telephone's JPEG, whose second frame is a preview
_MAY_NOT = "may not be read: change its mode"
_NO_TEXT = "prompt without a text"
_AN_ID = f"{_NO_TEXT} (its name is an id: give --prompts FILE, or a prompt.txt in a folder of its own)"
_NO_WORDS = f"{_NO_TEXT} (its prompt.txt is empty: write it there)"
_FEW = 5  # ids that an error names

TextOf = Callable[[str, bool], tuple[str, str]]


class _UnreadError(OSError):
    """A picture of a kind that is not read, or none at all."""


class UnnamedError(ValueError):
    """A flat folder whose names tell no prompt."""


class Fault(NamedTuple):
    """Something that a figure leaves out, and why."""

    kind: str
    name: str  # of a file, or of a prompt


class Loaded(NamedTuple):
    """The usable pictures of one prompt, RGB, and what was wrong with the others."""

    names: list[str]
    images: list[Image]
    faults: list[Fault]


class PictureSet(Protocol):
    """The pictures of one prompt, from different seeds."""

    id: str
    text: str  # the id where there is none
    no_text: str  # why there is none; empty where there is one

    def __len__(self) -> int: ...  # as found, usable or not

    def load(self) -> Loaded: ...


@dataclass(frozen=True)
class FileSet:
    """Pictures of one prompt, on disk.

    Attributes:
        id, text, no_text: as in PictureSet.
        files: that can be read by their ending.
        unread: pictures whose format is not read.
    """

    id: str
    text: str
    files: tuple[Path, ...]
    no_text: str = ""
    unread: tuple[Path, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def load(self) -> Loaded:
        """Read all files; what cannot be used becomes a fault."""
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
    """Pictures of one prompt, in memory: uint8 [n, 3, H, W]."""

    id: str
    text: str
    images: Tensor
    no_text: str = ""

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
        id, text, no_text: as in PictureSet.
        rows: of the cache.
        read: from rows to uint8 [n, 3, H, W].
    """

    id: str
    text: str
    rows: tuple[int, ...]
    read: Callable[[Sequence[int]], Tensor]
    no_text: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    def load(self) -> Loaded:
        return TensorSet(self.id, self.text, self.read(self.rows)).load()


def read_picture(path: Path) -> Image:
    """Decode one file to RGB as a viewer shows it: turned as its EXIF says, and what is transparent is white.

    Raises:
        OSError: its text is the kind of fault, the same for all files that have it.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        _refuse_no_content(path)
        with Image.open(path) as image:
            if image.mode not in _READABLE:
                raise _UnreadError(f"pixel format {image.mode}: convert it to 8 bits")
            frames = getattr(image, "n_frames", 1)
            if frames > 1 and image.format in _MOVING:
                raise _UnreadError("animated: save the frame that is meant")
            image.load()
            return _on_white(_upright(image))
    except _UnreadError:
        raise
    except PermissionError as error:
        raise OSError(_MAY_NOT) from error
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6
        raise OSError(f"more than {most} million pixels: scale it down") from error
    except (UnidentifiedImageError, ValueError) as error:
        raise OSError("not a picture") from error
    except (OSError, SyntaxError, EOFError, struct.error) as error:  # decoders differ in what they raise
        raise OSError("cut off or damaged") from error


def _refuse_no_content(path: Path) -> None:
    """Tell what has nothing to decode.

    Raises:
        _UnreadError: saying why.
    """
    if path.is_dir():
        raise _UnreadError("a folder, not a picture")
    if not path.is_file():
        raise _UnreadError("no such file")
    if path.stat().st_size == 0:
        raise _UnreadError("empty file")


def _upright(image: Image) -> Image:
    """Turned or mirrored as its EXIF says."""
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except (ValueError, SyntaxError, EOFError, struct.error):  # EXIF that cannot be read says nothing
        return image


def _on_white(image: Image) -> Image:
    """RGB over white: what lies hidden below transparent pixels is no part of the picture."""
    from PIL import Image

    if not image.has_transparency_data:
        return image.convert("RGB")
    covered = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", covered.size, "white"), covered).convert("RGB")


def of_one_size(loaded: Loaded) -> Loaded:
    """Keep the pictures of the size that most have (of a draw, the first); the others are faults."""
    names, images, faults = loaded
    if not images:
        return loaded
    common = Counter(image.size for image in images).most_common(1)[0][0]
    kept = [(name, image) for name, image in zip(names, images, strict=True) if image.size == common]
    kind = "another size than the prompt's other pictures"
    other = [Fault(kind, name) for name, image in zip(names, images, strict=True) if image.size != common]
    return Loaded([name for name, _ in kept], [image for _, image in kept], [*faults, *other])


def find_pictures(folder: Path, prompts: Path | None = None, any_name: bool = False) -> tuple[list[FileSet], list[str]]:
    """The sets of a folder in one of the three layouts, and the files that are no pictures.

    Args:
        folder: of pictures.
        prompts: texts of the prompt ids: .txt (line i is id i, from 0), or .csv or .jsonl with id and text.
        any_name: whether a flat folder's names may tell no prompt, as those of real pictures: each is a set of its own.

    Raises:
        UnnamedError: if they do not, and may not.
        ValueError: if the layout cannot be told, a name in it says nothing, or `prompts` lacks one of its ids.
        OSError: if there is no such folder, no picture in it, or something in it that may not be read.
    """
    try:
        return _found(Path(folder), prompts, any_name)
    except PermissionError as error:
        # what lies in a folder that may not be entered cannot be seen: the folder is what is to be changed
        place = Path(error.filename)
        raise OSError(f"{place if os.path.lexists(place) else place.parent} {_MAY_NOT}") from error


def _found(folder: Path, prompts: Path | None, any_name: bool) -> tuple[list[FileSet], list[str]]:
    """What `find_pictures` returns."""
    if not folder.is_dir():
        raise OSError(f"{folder} is no folder of pictures")
    text_of = partial(_text_in, Path(prompts), read_texts(prompts)) if prompts else _text_of_name
    manifests = [folder / name for name in _MANIFESTS if (folder / name).is_file()]
    if len(manifests) > 1:
        raise ValueError(f"{folder} has {' and '.join(_MANIFESTS)}: keep the one that is meant")
    if manifests:
        sets = _from_manifest(manifests[0])
        return sets, _not_named(folder, sets)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    flat = [path for path in entries if _is_picture(path)]
    rooms = [path for path in entries if os.path.isdir(path)]
    filled = [room for room in rooms if any(map(_is_picture, _in_room(room)))]
    if flat:
        flat += filter(_is_named_so, rooms)
    if flat and filled:
        raise ValueError(
            f"{folder} has pictures beside folders of pictures ({flat[0].name}, {filled[0].name}/): use one layout"
        )
    if not flat and not filled:
        raise OSError(f"{folder} has no picture ({', '.join(sorted(SUFFIXES))}) and no folder of them{_deeper(rooms)}")
    if flat and any_name and not _tell_prompts(flat):
        return _alone(entries, set(flat))
    if flat:
        unread = [path for path in entries if _is_unread(path) and _ID_AND_SEED.fullmatch(path.stem)]
        read = {*flat, *unread}
        return _from_names(flat, unread, text_of), [path.name for path in entries if path not in read]
    rest = [path.name for path in entries if path not in set(rooms)]
    rest += [str(path.relative_to(folder)) for room in rooms for path in _in_room(room) if _is_stray(path)]
    return [_from_room(room, text_of) for room in rooms], rest


def _alone(entries: Sequence[Path], flat: set[Path]) -> tuple[list[FileSet], list[str]]:
    """Each picture of a flat folder as a set of its own, and the other files."""
    sets, rest = [], []
    for path in entries:
        if path in flat:
            sets.append(FileSet(path.name, path.name, (path,), _AN_ID))
        elif _is_unread(path):
            sets.append(FileSet(path.name, path.name, (), _AN_ID, (path,)))
        else:
            rest.append(path.name)
    return sets, rest


def _tell_prompts(files: Sequence[Path]) -> bool:
    """Whether names are of prompts and seeds; COCO_val2014_000000000042.jpg and thousands like it are of none."""
    found = [_ID_AND_SEED.fullmatch(file.stem) for file in files]
    return all(found) and (len(found) <= _SEEDS_AT_MOST or len({match[1] for match in found if match}) > 1)


def _in_room(room: Path) -> list[Path]:
    """What lies in a prompt's folder; of GenEval's, whose grid.png shows the pictures once more, in its samples/."""
    is_geneval = (room / _GENEVAL).is_file() and (room / "samples").is_dir()
    return sorted((room / "samples" if is_geneval else room).iterdir())


def _deeper(rooms: Sequence[Path]) -> str:
    """Where pictures lie that are not found, if a folder deeper."""
    inner = (path for room in rooms for path in sorted(room.iterdir()) if path.is_dir())
    found = next((path for path in inner if any(map(_is_picture, path.iterdir()))), None)
    return f"; there are pictures in {found}: give {found.parent}" if found else ""


def _not_named(folder: Path, sets: Sequence[FileSet]) -> list[str]:
    """Pictures beside a manifest that it does not name."""
    named = {os.path.normpath(file) for one in sets for file in one.files}
    found = (path for path in folder.rglob("*") if not path.name.startswith("."))
    there = sorted(path for path in found if _is_picture(path) or _is_unread(path))
    return [str(path.relative_to(folder)) for path in there if os.path.normpath(path) not in named]


def about_strays(folder: Path, rest: Sequence[str], role: str = "") -> str:
    """One line about files that are no pictures; empty where there are none.

    Args:
        folder: where they lie.
        rest: their names, as `find_pictures` returns them.
        role: of the folder.
    """
    if not rest:
        return ""
    by_manifest = any((folder / name).is_file() for name in _MANIFESTS)
    why = "since its manifest does not name them" if by_manifest else "since no picture that is read"
    return f"left out of {folder}{role}, {why}: {listed(rest, _FEW)}"


def about_names(folder: Path, sets: Sequence[FileSet]) -> str:
    """One line about a folder of which each picture is a set of its own, since names tell no prompt; else empty."""
    alone = all(one.no_text == _AN_ID and one.id == file.name for one in sets for file in (*one.files, *one.unread))
    return f"names in {folder} tell no prompts: each picture counts as one" if alone else ""


def _is_named_so(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def _is_picture(path: Path) -> bool:
    # a link to nowhere, or to where nobody may look, is a picture that cannot be used, and is counted
    return _is_named_so(path) and not os.path.isdir(path)


def _is_unread(path: Path) -> bool:
    return path.suffix.lower() in _UNREAD and not os.path.isdir(path)


def _is_stray(path: Path) -> bool:
    wanted = _is_named_so(path) or _is_unread(path) or path.name == "prompt.txt"
    return not wanted and not path.name.startswith(".")


def _text_in(file: Path, texts: dict[str, str], name: str, is_text: bool) -> tuple[str, str]:
    """The text that a file of prompts has for an id. A name that would do as a text is no excuse.

    Raises:
        ValueError: if the file has none.
    """
    if name not in texts:
        raise ValueError(f"id {name!r} is not in {file}, which has {_described(list(texts))}: write both alike")
    return texts[name], ""


def _described(ids: list[str]) -> str:
    if not ids:
        return "none"
    if ids == [str(number) for number in range(len(ids))]:
        return f"0 to {len(ids) - 1}"
    return listed(ids, _FEW)


def _text_of_name(name: str, is_text: bool) -> tuple[str, str]:
    """A name as the text, or as an id with the reason why it is no text."""
    return name, "" if is_text else _AN_ID


def _from_room(room: Path, text_of: TextOf) -> FileSet:
    note = room / "prompt.txt"
    if note.is_file():
        text = _read(note).strip()
        text, no_text = (text, "") if text else (room.name, _NO_WORDS)
    elif (room / _GENEVAL).is_file():
        text, no_text = _prompt_of(room / _GENEVAL), ""
    else:
        text, no_text = text_of(room.name, " " in room.name or not re.search(r"\d", room.name))
    found = _in_room(room)
    files, unread = (tuple(sorted(filter(kind, found), key=_by_number)) for kind in (_is_named_so, _is_unread))
    return FileSet(room.name, text, files, no_text, unread)


def _prompt_of(record: Path) -> str:
    """The prompt of GenEval's record of one folder.

    Raises:
        ValueError: if it has none.
    """
    prompts = [line.get("prompt") for line in _records(record)]
    if len(prompts) != 1 or not prompts[0]:
        raise ValueError(f"{record} has not one record with a prompt, as GenEval writes it: write prompt.txt beside it")
    return str(prompts[0])


def _from_names(files: Sequence[Path], unread: Sequence[Path], text_of: TextOf) -> list[FileSet]:
    """`<prompt-id>_<seed>.png`; the id may have underscores itself."""
    groups: dict[str, tuple[list[Path], list[Path]]] = {}
    for file in [*files, *unread]:
        found = _ID_AND_SEED.fullmatch(file.stem)
        if not found:
            raise UnnamedError(f"{file} is not named <prompt-id>_<seed>: rename it, or describe it in manifest.csv")
        groups.setdefault(found[1], ([], []))[_is_unread(file)].append(file)
    sets = []
    for name, group in groups.items():
        text, no_text = text_of(name, " " in name)
        read, others = (tuple(sorted(part, key=_by_number)) for part in group)
        sets.append(FileSet(name, text, read, no_text, others))
    return sets


def _by_number(path: Path) -> list[int | str]:
    """Order in which 10 comes after 9."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _from_manifest(manifest: Path) -> list[FileSet]:
    groups: dict[str, tuple[str, list[Path]]] = {}
    lines: dict[str, int] = {}  # by file
    for line, record in enumerate(_records(manifest), start=1):
        absent = [key for key in ("file", "prompt") if not record.get(key)]
        if absent:
            raise ValueError(f"{manifest}, record {line} has no {' and no '.join(absent)}: give both")
        text, file = str(record["prompt"]), manifest.parent / str(record["file"])
        name = text if record.get("id") in (None, "") else str(record["id"])
        first = lines.setdefault(os.path.normpath(file), line)
        if first != line:
            raise ValueError(f"{manifest}, record {line} names {record['file']} as record {first} does: name it once")
        known, files = groups.setdefault(name, (text, []))
        if known != text:
            raise ValueError(f"{manifest}, record {line}: id {name} has two prompts, {known!r} and {text!r}")
        files.append(file)
    if not groups:
        raise ValueError(f"{manifest} is empty: name one picture per record")
    return [FileSet(name, text, tuple(files)) for name, (text, files) in groups.items()]


def _read(path: Path) -> str:
    """Text of a file of the user's.

    Raises:
        OSError: if it is not there.
        ValueError: if it is not UTF-8.
    """
    if not path.is_file():
        raise OSError(f"{path}: there is no such file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path} is not UTF-8 (byte {byte:#04x} at {error.start}): save it as UTF-8") from error


def _records(path: Path) -> Iterable[dict]:
    """Records of a .csv or .jsonl file."""
    file = io.StringIO(_read(path), newline="")
    if path.suffix == ".csv":
        try:
            yield from csv.DictReader(file)
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error}") from error
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
        ValueError: for another ending than .txt, .csv, .jsonl, a record without id and text, or an id with two texts.
        OSError: if there is no such file.
    """
    path = Path(path)
    if path.suffix == ".txt":
        lines = _read(path).splitlines()
        return {str(number): line.strip() for number, line in enumerate(lines) if line.strip()}
    if path.suffix not in {".csv", ".jsonl"}:
        raise ValueError(f"{path}: prompts are read from .txt, .csv or .jsonl")
    texts = {}
    for line, record in enumerate(_records(path), start=1):
        if record.get("id") in (None, "") or not record.get("text"):
            raise ValueError(f"{path}, record {line} lacks id or text: give both")
        name, text = str(record["id"]), str(record["text"])
        if texts.setdefault(name, text) != text:
            raise ValueError(f"{path}, record {line}: id {name} has two texts, {texts[name]!r} and {text!r}")
    return texts


def read_parts(path: Path) -> dict[str, dict]:
    """GenEval's records by text of their prompt.

    Raises:
        ValueError: for a record without a prompt, or of whose parts nothing can be asked.
    """
    from dpdmd_pipeline.metrics.questions import part_questions

    records = list(_records(Path(path)))
    for line, record in enumerate(records, start=1):
        if not record.get("prompt"):
            raise ValueError(f"{path}, record {line} has no prompt: it is not GenEval's evaluation_metadata.jsonl")
        try:
            part_questions(record)
        except ValueError as error:
            raise ValueError(f"{path}, record {line} ({record['prompt']}): {error}") from error
    return {record["prompt"]: record for record in records}
