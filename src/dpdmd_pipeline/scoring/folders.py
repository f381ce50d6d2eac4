"""Find the sets of pictures in a folder, and the files that are ignored; `score --help` describes the layouts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from dpdmd_pipeline.scoring.sets import MAY_NOT_READ, FileSet
from dpdmd_pipeline.scoring.texts import field_as_text, read_records, read_text, read_texts
from dpdmd_pipeline.wording import is_blank, listed, refused_character, short

_MANIFESTS = ("manifest.csv", "manifest.jsonl")
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Formats with several frames, more than 8 bits, or without support in every Pillow.
_UNREAD_SUFFIXES = {".avif", ".gif", ".heic", ".heif", ".jxl", ".tif", ".tiff"}
_GENEVAL = "metadata.jsonl"
_ID_AND_SEED = re.compile(r"(.+)_(\d+)_?")
_MAX_SEEDS = 100  # for one prompt alone, where the folder may also hold real pictures
_NO_TEXT = "prompt without a text"
_NAME_IS_AN_ID = f"{_NO_TEXT} (its name is an id: give --prompts FILE, or a prompt.txt in a folder of its own)"
_NAME_IS_NO_TEXT = f"{_NO_TEXT} (its name is no text in UTF-8: rename it, or give a prompt.txt in a folder of its own)"
_EMPTY_NOTE = f"{_NO_TEXT} (its prompt.txt is empty: write the text there)"
_FEW, _LONGEST = 5, 80  # names in a message, and characters of a text
# In lower case; macOS, Synology and Windows make them.
_SYSTEM_NAMES = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}

FolderContents = tuple[list[FileSet], list[str]]  # sets of pictures, and names of the other files
_TextOf = Callable[[str, bool], tuple[str, str]]  # (name, name can be a text) -> text, reason for having none


class UnnamedError(ValueError):
    """A flat folder whose names do not tell the prompts."""


def find_pictures(folder: Path, prompts: Path | None = None, any_name: bool = False) -> FolderContents:
    """Find the sets of a folder in one of three layouts, and the files that are not pictures.

    Args:
        prompts: texts of the prompt ids: .txt (line i is id i, from 0), or .csv or .jsonl with id and text.
        any_name: accept a flat folder whose names tell no prompt, such as real pictures: each is a set of its own.

    Raises:
        UnnamedError: if names tell no prompt and `any_name` is false.
    """
    try:
        return _find(Path(folder), prompts, any_name)
    except PermissionError as error:
        # The contents of a closed folder are invisible: then the folder is what must be opened.
        path = Path(error.filename)
        raise OSError(f"{path if os.path.lexists(path) else path.parent} {MAY_NOT_READ}") from error


def _find(folder: Path, prompts: Path | None, any_name: bool) -> FolderContents:
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder of pictures")
    text_of = _texts(prompts)
    manifests = [folder / name for name in _MANIFESTS if (folder / name).is_file()]
    if len(manifests) > 1:
        raise ValueError(f"{folder} has {' and '.join(_MANIFESTS)}: delete one of them")
    if manifests:
        sets = _from_manifest(manifests[0])
        return sets, _not_named(folder, sets)
    entries = _entries(folder)
    pictures = [path for path in entries if _is_picture(path)]
    folders = [path for path in entries if os.path.isdir(path)]
    filled = [path for path in folders if any(map(_is_picture, _in_prompt_folder(path)))]
    if pictures and filled:
        raise ValueError(
            f"{folder} has pictures beside folders of pictures ({pictures[0].name}, {filled[0].name}/): use one layout"
        )
    if pictures:
        pictures += filter(_has_picture_name, folders)  # counted as unusable pictures
        return _find_flat(entries, pictures, text_of, any_name)
    if not filled:
        inner = [path for one in folders for path in _entries(one) if path.is_dir()]
        deeper = [path for path in inner if any(map(_is_picture, _entries(path)))]
        hint = f"; there are pictures in {deeper[0]}: give {deeper[0].parent}" if deeper else ""
        raise OSError(f"{folder} has no picture ({', '.join(sorted(_SUFFIXES))}) and no folder of them{hint}")
    strays = [path.name for path in entries if path not in set(folders)]
    inner = [path for one in folders for path in _in_prompt_folder(one)]
    used = (_has_picture_name, _is_unread, lambda path: path.name == "prompt.txt")
    strays += [str(path.relative_to(folder)) for path in inner if not any(is_kind(path) for is_kind in used)]
    return [_from_prompt_folder(path, text_of) for path in folders], strays


def _find_flat(entries: Sequence[Path], pictures: Sequence[Path], text_of: _TextOf, any_name: bool) -> FolderContents:
    """Sets and other files of a folder with a file per picture."""
    unread = [path for path in entries if _is_unread(path)]
    if any_name and not _names_tell_prompts(pictures):
        sets = _one_set_each(pictures, unread)
    else:
        unread = [path for path in unread if _ID_AND_SEED.fullmatch(path.stem)]
        sets = _from_names(pictures, unread, text_of)
    used = {*pictures, *unread}
    return sets, [path.name for path in entries if path not in used]


def _not_named(folder: Path, sets: Sequence[FileSet]) -> list[str]:
    """Pictures that the folder's manifest does not name."""
    named = {os.path.normpath(file) for one in sets for file in one.files}
    pictures = [path for path in sorted(folder.rglob("*")) if _is_picture(path) or _is_unread(path)]
    others = [path.relative_to(folder) for path in pictures if os.path.normpath(path) not in named]
    return [str(path) for path in others if not any(map(_is_ignored, path.parts))]


def about_strays(folder: Path, strays: Sequence[str], role: str = "") -> str:
    """Note on the ignored files of a folder, whose name its role follows; empty if there are none."""
    if not strays:
        return ""
    has_manifest = any((folder / name).is_file() for name in _MANIFESTS)
    why = "its manifest does not name them" if has_manifest else "not pictures in a readable format"
    return f"ignored files in {folder}{role} ({why}): {listed(strays, _FEW)}"


def about_names(folder: Path, sets: Sequence[FileSet]) -> str:
    """Note on a folder whose pictures are sets of their own because names tell no prompt; empty for others."""
    owners = [(one, file) for one in sets for file in (*one.files, *one.unread)]
    alone = all(one.no_text == _NAME_IS_AN_ID and one.id == file.name for one, file in owners)
    return f"names in {folder} tell no prompts: each picture counts as one prompt" if alone else ""


# ---- names of files


def _entries(folder: Path) -> list[Path]:
    """The sorted contents of a folder that the user may have made."""
    return sorted(path for path in folder.iterdir() if not _is_ignored(path.name))


def _is_ignored(name: str) -> bool:
    """True for names of hidden files and of those that systems make, such as ._0.png and __MACOSX."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _has_picture_name(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES


def _is_picture(path: Path) -> bool:
    """True for a file named like a picture; also for a broken link, which counts as an unusable picture."""
    return _has_picture_name(path) and not os.path.isdir(path)


def _is_unread(path: Path) -> bool:
    """True for a picture in a format that is not read."""
    return path.suffix.lower() in _UNREAD_SUFFIXES and not os.path.isdir(path)


def _names_tell_prompts(files: Sequence[Path]) -> bool:
    """True if names have the form <prompt-id>_<seed>; false for thousands like COCO_val2014_000000000042.jpg."""
    ids = [match[1] for file in files if (match := _ID_AND_SEED.fullmatch(file.stem))]
    return len(ids) == len(files) and (len(files) <= _MAX_SEEDS or len(set(ids)) > 1)


# ---- texts of prompts


def _texts(prompts: Path | None) -> _TextOf:
    """Function that takes names as texts, or looks up every id in a file, also one that could be a text."""
    if prompts is None:
        return _text_from_name
    texts = read_texts(prompts)

    def look_up(name: str, can_be_text: bool) -> tuple[str, str]:
        if name not in texts:
            ids, last = list(texts), len(texts) - 1
            is_range = ids and ids == [str(number) for number in range(last + 1)]
            shown = f"0 to {last}" if is_range else listed(ids, _FEW) or "none"
            raise ValueError(f"id {name!r} is not in {prompts}, which has {shown}: use the same ids in both")
        return texts[name], ""

    return look_up


def _text_from_name(name: str, can_be_text: bool) -> tuple[str, str]:
    """The name as text, or as an id together with the reason why it is not a text."""
    if refused_character(name):  # no tokenizer reads it
        return name, _NAME_IS_NO_TEXT
    return name, "" if can_be_text else _NAME_IS_AN_ID


# ---- sets of each layout


def _in_prompt_folder(folder: Path) -> list[Path]:
    """Entries of a prompt's folder; GenEval's has them in samples/, and repeats the pictures in grid.png."""
    is_geneval = (folder / _GENEVAL).is_file() and (folder / "samples").is_dir()
    return _entries(folder / "samples" if is_geneval else folder)


def _from_prompt_folder(folder: Path, text_of: _TextOf) -> FileSet:
    text, no_text = _text_of_folder(folder, text_of)
    entries = _in_prompt_folder(folder)
    files, unread = (_in_order(filter(is_kind, entries)) for is_kind in (_has_picture_name, _is_unread))
    return FileSet(folder.name, text, files, no_text, unread)


def _text_of_folder(folder: Path, text_of: _TextOf) -> tuple[str, str]:
    note, record = folder / "prompt.txt", folder / _GENEVAL
    if note.is_file():
        text = read_text(note).strip()
        return (folder.name, _EMPTY_NOTE) if is_blank(text) else (text, "")
    if record.is_file():
        prompts = [field_as_text(one, "prompt", str(record)) for one in read_records(record)]
        if len(prompts) != 1 or not prompts[0]:
            raise ValueError(f"{record} must have one record with a prompt, as GenEval's: write prompt.txt beside it")
        return prompts[0], ""
    return text_of(folder.name, " " in folder.name or not re.search(r"\d", folder.name))


def _from_names(files: Sequence[Path], unread: Sequence[Path], text_of: _TextOf) -> list[FileSet]:
    """Sets of pictures named `<prompt-id>_<seed>.png`; the id may contain underscores."""
    groups: dict[str, tuple[list[Path], list[Path]]] = {}
    for file in [*files, *unread]:
        match = _ID_AND_SEED.fullmatch(file.stem)
        if not match:
            raise UnnamedError(f"{file} is not named <prompt-id>_<seed>: rename it, or describe it in manifest.csv")
        groups.setdefault(match[1], ([], []))[_is_unread(file)].append(file)
    sets = []
    for name, group in groups.items():
        text, no_text = text_of(name, " " in name)
        readable, others = map(_in_order, group)
        sets.append(FileSet(name, text, readable, no_text, others))
    return sets


def _one_set_each(pictures: Sequence[Path], unread: Sequence[Path]) -> list[FileSet]:
    """A set for each picture of a flat folder with any names."""
    sets = [FileSet(path.name, path.name, (path,), _NAME_IS_AN_ID) for path in pictures]
    sets += [FileSet(path.name, path.name, (), _NAME_IS_AN_ID, (path,)) for path in unread]
    return sorted(sets, key=lambda one: one.id)


def _in_order(paths: Iterable[Path]) -> tuple[Path, ...]:
    """Sort by name, with 10 after 9."""

    def words_and_numbers(path: Path) -> list[int | str]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path.name)]

    return tuple(sorted(paths, key=words_and_numbers))


def _from_manifest(manifest: Path) -> list[FileSet]:
    """Sets of the pictures that a manifest names."""
    groups: dict[str, tuple[str, list[Path]]] = {}
    records_of_files: dict[str, int] = {}
    for line, record in enumerate(read_records(manifest), start=1):
        source = f"{manifest}, record {line}"
        name, text, file = (field_as_text(record, key, source, key == "file") for key in ("id", "prompt", "file"))
        absent = [key for key, value in {"file": file, "prompt": text}.items() if not value]
        if absent:
            raise ValueError(f"{source} has no {' and no '.join(absent)}: give both")
        path, name = manifest.parent / file, name or text
        first = records_of_files.setdefault(os.path.normpath(path), line)
        if first != line:
            raise ValueError(f"{source} repeats file {short(file, _LONGEST)} of record {first}: name it once")
        group_text, files = groups.setdefault(name, (text, []))
        if group_text != text:
            both = " and ".join(short(repr(one), _LONGEST) for one in (group_text, text))
            raise ValueError(f"{source}: id {short(name, _LONGEST)} has two prompts, {both}")
        files.append(path)
    if not groups:
        raise ValueError(f"{manifest} is empty: name one picture per record")
    return [FileSet(name, text, tuple(files)) for name, (text, files) in groups.items()]
