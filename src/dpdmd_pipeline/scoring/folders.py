"""Find the sets of pictures in a folder, and report the files that are ignored."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from dpdmd_pipeline.scoring import layouts
from dpdmd_pipeline.scoring.decode import MAY_NOT_READ
from dpdmd_pipeline.scoring.sets import FileSet
from dpdmd_pipeline.wording import listed

_MANIFESTS = ("manifest.csv", "manifest.jsonl")

FolderContents = tuple[list[FileSet], list[str]]  # sets of pictures, and names of the other files


def find_pictures(folder: Path, prompts: Path | None = None, any_name: bool = False) -> FolderContents:
    """Find the sets of a folder in one of the layouts of `layouts`, and the files that are not pictures.

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
    text_of = layouts.texts_from_file(Path(prompts)) if prompts else layouts.text_from_name
    manifests = [folder / name for name in _MANIFESTS if (folder / name).is_file()]
    if len(manifests) > 1:
        raise ValueError(f"{folder} has {' and '.join(_MANIFESTS)}: delete one of them")
    if manifests:
        sets = layouts.from_manifest(manifests[0])
        return sets, _not_named(folder, sets)
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    pictures = [path for path in entries if layouts.is_picture(path)]
    folders = [path for path in entries if os.path.isdir(path)]
    filled = [path for path in folders if any(map(layouts.is_picture, layouts.in_prompt_folder(path)))]
    if pictures and filled:
        raise ValueError(
            f"{folder} has pictures beside folders of pictures ({pictures[0].name}, {filled[0].name}/): use one layout"
        )
    if pictures:
        pictures += filter(layouts.has_picture_name, folders)  # counted as unusable pictures
        return _find_flat(entries, pictures, text_of, any_name)
    if not filled:
        raise OSError(
            f"{folder} has no picture ({', '.join(sorted(layouts.SUFFIXES))}) and no folder of them{_deeper(folders)}"
        )
    strays = [path.name for path in entries if path not in set(folders)]
    inner = [path for one in folders for path in layouts.in_prompt_folder(one)]
    strays += [str(path.relative_to(folder)) for path in inner if layouts.is_stray(path)]
    return [layouts.from_prompt_folder(path, text_of) for path in folders], strays


def _find_flat(
    entries: Sequence[Path], pictures: Sequence[Path], text_of: layouts.TextOf, any_name: bool
) -> FolderContents:
    """Sets and other files of a folder with a file per picture."""
    unread = [path for path in entries if layouts.is_unread(path)]
    if any_name and not layouts.names_tell_prompts(pictures):
        sets = layouts.one_set_each(pictures, unread)
    else:
        unread = [path for path in unread if layouts.has_id_and_seed(path)]
        sets = layouts.from_names(pictures, unread, text_of)
    used = {*pictures, *unread}
    return sets, [path.name for path in entries if path not in used]


def _deeper(folders: Sequence[Path]) -> str:
    """Hint for the error message if pictures exist one folder deeper."""
    inner = (path for folder in folders for path in sorted(folder.iterdir()) if path.is_dir())
    filled = next((path for path in inner if any(map(layouts.is_picture, path.iterdir()))), None)
    return f"; there are pictures in {filled}: give {filled.parent}" if filled else ""


def _not_named(folder: Path, sets: Sequence[FileSet]) -> list[str]:
    """Pictures that the folder's manifest does not name."""
    named = {os.path.normpath(file) for one in sets for file in one.files}
    files = sorted(path for path in folder.rglob("*") if not path.name.startswith("."))
    pictures = [path for path in files if layouts.is_picture(path) or layouts.is_unread(path)]
    return [str(path.relative_to(folder)) for path in pictures if os.path.normpath(path) not in named]


def about_strays(folder: Path, strays: Sequence[str], role: str = "") -> str:
    """Note on the ignored files of a folder, whose name its role follows; empty if there are none."""
    if not strays:
        return ""
    has_manifest = any((folder / name).is_file() for name in _MANIFESTS)
    why = "its manifest does not name them" if has_manifest else "not pictures in a readable format"
    return f"ignored files in {folder}{role} ({why}): {listed(strays, layouts.FEW)}"


def about_names(folder: Path, sets: Sequence[FileSet]) -> str:
    """Note on a folder whose pictures are sets of their own because names tell no prompt; empty for others."""
    owners = [(one, file) for one in sets for file in (*one.files, *one.unread)]
    if all(one.no_text == layouts.NAME_IS_AN_ID and one.id == file.name for one, file in owners):
        return f"names in {folder} tell no prompts: each picture counts as one prompt"
    return ""
