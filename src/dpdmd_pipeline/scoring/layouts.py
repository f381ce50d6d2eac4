"""Sets of pictures from the names of files and folders, or from a manifest; `score --help` describes the layouts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from dpdmd_pipeline.scoring.sets import FileSet
from dpdmd_pipeline.scoring.texts import read_records, read_text, read_texts
from dpdmd_pipeline.wording import listed

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Formats with several frames, more than 8 bits, or without support in every Pillow.
_UNREAD_SUFFIXES = {".avif", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"}
_GENEVAL = "metadata.jsonl"
_ID_AND_SEED = re.compile(r"(.+)_(\d+)_?")
_MAX_SEEDS = 100  # for one prompt alone, where the folder may also hold real pictures
_NO_TEXT = "prompt without a text"
NAME_IS_AN_ID = f"{_NO_TEXT} (its name is an id: give --prompts FILE, or a prompt.txt in a folder of its own)"
_EMPTY_NOTE = f"{_NO_TEXT} (its prompt.txt is empty: write the text there)"
FEW = 5  # names in a message

TextOf = Callable[[str, bool], tuple[str, str]]  # (name, name can be a text) -> text, reason for having none


class UnnamedError(ValueError):
    """A flat folder whose names do not tell the prompts."""


def has_picture_name(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def is_picture(path: Path) -> bool:
    """True for a file named like a picture; also for a broken link, which counts as an unusable picture."""
    return has_picture_name(path) and not os.path.isdir(path)


def is_unread(path: Path) -> bool:
    """True for a picture in a format that is not read."""
    return path.suffix.lower() in _UNREAD_SUFFIXES and not os.path.isdir(path)


def is_stray(path: Path) -> bool:
    """True for a file in a prompt's folder that is not a picture, not prompt.txt and not hidden."""
    expected = has_picture_name(path) or is_unread(path) or path.name == "prompt.txt"
    return not expected and not path.name.startswith(".")


def has_id_and_seed(path: Path) -> bool:
    return bool(_ID_AND_SEED.fullmatch(path.stem))


def names_tell_prompts(files: Sequence[Path]) -> bool:
    """True if names have the form <prompt-id>_<seed>; false for thousands like COCO_val2014_000000000042.jpg."""
    ids = [match[1] for file in files if (match := _ID_AND_SEED.fullmatch(file.stem))]
    return len(ids) == len(files) and (len(files) <= _MAX_SEEDS or len(set(ids)) > 1)


def text_from_name(name: str, can_be_text: bool) -> tuple[str, str]:
    """The name as text, or as an id together with the reason why it is not a text."""
    return name, "" if can_be_text else NAME_IS_AN_ID


def texts_from_file(file: Path) -> TextOf:
    """Function that looks up prompt ids in a file; it requires every id, also one that could be a text."""
    return partial(_look_up, file, read_texts(file))


def _look_up(file: Path, texts: dict[str, str], name: str, can_be_text: bool) -> tuple[str, str]:
    if name not in texts:
        raise ValueError(f"id {name!r} is not in {file}, which has {_described(list(texts))}: use the same ids in both")
    return texts[name], ""


def _described(ids: list[str]) -> str:
    if not ids:
        return "none"
    if ids == [str(number) for number in range(len(ids))]:
        return f"0 to {len(ids) - 1}"
    return listed(ids, FEW)


def in_prompt_folder(folder: Path) -> list[Path]:
    """Entries of a prompt's folder; GenEval's has them in samples/, and repeats the pictures in grid.png."""
    is_geneval = (folder / _GENEVAL).is_file() and (folder / "samples").is_dir()
    return sorted((folder / "samples" if is_geneval else folder).iterdir())


def from_prompt_folder(folder: Path, text_of: TextOf) -> FileSet:
    text, no_text = _text_of_folder(folder, text_of)
    entries = in_prompt_folder(folder)
    files, unread = (_in_order(filter(is_kind, entries)) for is_kind in (has_picture_name, is_unread))
    return FileSet(folder.name, text, files, no_text, unread)


def _text_of_folder(folder: Path, text_of: TextOf) -> tuple[str, str]:
    note = folder / "prompt.txt"
    if note.is_file():
        text = read_text(note).strip()
        return (text, "") if text else (folder.name, _EMPTY_NOTE)
    if (folder / _GENEVAL).is_file():
        return _prompt_of_record(folder / _GENEVAL), ""
    return text_of(folder.name, " " in folder.name or not re.search(r"\d", folder.name))


def _prompt_of_record(path: Path) -> str:
    prompts = [record.get("prompt") for record in read_records(path)]
    if len(prompts) != 1 or not prompts[0]:
        raise ValueError(f"{path} must have one record with a prompt, as from GenEval: write prompt.txt beside it")
    return str(prompts[0])


def from_names(files: Sequence[Path], unread: Sequence[Path], text_of: TextOf) -> list[FileSet]:
    """Sets of pictures named `<prompt-id>_<seed>.png`; the id may contain underscores.

    Raises:
        UnnamedError: for another name.
    """
    groups: dict[str, tuple[list[Path], list[Path]]] = {}
    for file in [*files, *unread]:
        match = _ID_AND_SEED.fullmatch(file.stem)
        if not match:
            raise UnnamedError(f"{file} is not named <prompt-id>_<seed>: rename it, or describe it in manifest.csv")
        groups.setdefault(match[1], ([], []))[is_unread(file)].append(file)
    sets = []
    for name, group in groups.items():
        text, no_text = text_of(name, " " in name)
        readable, others = map(_in_order, group)
        sets.append(FileSet(name, text, readable, no_text, others))
    return sets


def one_set_each(pictures: Sequence[Path], unread: Sequence[Path]) -> list[FileSet]:
    """A set for each picture of a flat folder with any names."""
    sets = [FileSet(path.name, path.name, (path,), NAME_IS_AN_ID) for path in pictures]
    sets += [FileSet(path.name, path.name, (), NAME_IS_AN_ID, (path,)) for path in unread]
    return sorted(sets, key=lambda one: one.id)


def _in_order(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Sort by name, with 10 after 9."""

    def words_and_numbers(path: Path) -> list[int | str]:
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]

    return tuple(sorted(paths, key=words_and_numbers))


def from_manifest(manifest: Path) -> list[FileSet]:
    """Sets of the pictures that a manifest names."""
    groups: dict[str, tuple[str, list[Path]]] = {}
    records_of_files: dict[str, int] = {}
    for line, record in enumerate(read_records(manifest), start=1):
        absent = [key for key in ("file", "prompt") if not record.get(key)]
        if absent:
            raise ValueError(f"{manifest}, record {line} has no {' and no '.join(absent)}: give both")
        text, file = str(record["prompt"]), manifest.parent / str(record["file"])
        name = text if record.get("id") in (None, "") else str(record["id"])
        first = records_of_files.setdefault(os.path.normpath(file), line)
        if first != line:
            raise ValueError(f"{manifest}, record {line} repeats file {record['file']} of record {first}: name it once")
        group_text, files = groups.setdefault(name, (text, []))
        if group_text != text:
            raise ValueError(f"{manifest}, record {line}: id {name} has two prompts, {group_text!r} and {text!r}")
        files.append(file)
    if not groups:
        raise ValueError(f"{manifest} is empty: name one picture per record")
    return [FileSet(name, text, tuple(files)) for name, (text, files) in groups.items()]
