"""Pictures of prompts as files, laid out as `python -m dpdmd_pipeline score` and `arena` read them.

samples/
    a red circle/            a folder per prompt, named by it
        0.png 1.png ...      a picture per seed
    00001_a-cat-a-dog/       where no folder can be named so: "A cat / a dog"
        prompt.txt           the prompt
        0.png 1.png ...
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from dpdmd_pipeline.publishing import Folders, load_published, replacing, sync

log = logging.getLogger(__name__)

NOTE = "prompt.txt"
EMPTY = "empty.txt"  # DVC wants something in a folder
_LONGEST = 150  # bytes; file systems take 255
_UNFIT = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # on one system or another
_NUMBERED = re.compile(r"\d{5}_")


class PictureFolderDataset(AbstractDataset[Mapping[str, Any], Path]):
    """Pictures by prompt and seed. Saves what draws or reads them, a prompt in memory at a time; loads the path.

    Args:
        filepath: the folder.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        """The folder.

        Raises:
            FileNotFoundError: if there is none.
        """
        folders = Folders.of(self._filepath)
        folder = load_published(folders)
        if folder is None:
            raise FileNotFoundError(f"{folders.published} does not exist: run the stage that writes it")
        return folder

    def save(self, data: Mapping[str, Any]) -> None:
        """Write beside the old folder and take its place; killed at any moment, one of the two is whole.

        Args:
            data: prompt -> function without arguments that gives its pictures (Pillow's) by seed; or name of a folder
                inside -> such a mapping of its own. Empty, it leaves a folder with a note in it.

        Raises:
            ValueError: if another process is writing.
            OSError: naming the path, if it cannot be written.
        """
        folders = Folders.of(self._filepath)
        with replacing(folders) as folder:
            count = _write(folder, data)
        if count:
            log.info("%s: %d pictures saved", folders.published.name, count)

    def _exists(self) -> bool:
        folders = Folders.of(self._filepath)
        return folders.published.exists() or folders.ready.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


def folder_names(prompts: Iterable[str]) -> dict[str, str]:
    """A folder's name for each prompt: the prompt itself, or a number and a piece of it.

    The latter where a letter has a meaning of its own to a system, and where a disk might take two names for one.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for number, prompt in enumerate(prompts):
        plain = _is_name(prompt) and prompt.casefold() not in taken  # some disks do not tell A from a
        names[prompt] = prompt if plain else f"{number:05d}_{_slug(prompt)}"
        taken.add(names[prompt].casefold())
    return names


def _is_name(prompt: str) -> bool:
    fits = 0 < len(prompt.encode()) <= _LONGEST and prompt == prompt.strip(" .")  # a leading dot hides it
    is_text = " " in prompt or not re.search(r"\d", prompt)  # else `score` takes it for an id
    return fits and is_text and not _UNFIT.search(prompt) and not _NUMBERED.match(prompt)


def _slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "prompt"


def _write(folder: Path, data: Mapping[str, Any]) -> int:
    """Fill an empty folder; returns the number of pictures."""
    names = folder_names(name for name, found in data.items() if callable(found))
    count = 0
    for name, found in data.items():
        if callable(found):
            count += _write_prompt(folder / names[name], name, found)
        else:
            (folder / name).mkdir()
            count += _write(folder / name, found)
    if not data:
        _write_text(folder / EMPTY, "No pictures were asked for.")
    sync(folder)
    return count


def _write_prompt(folder: Path, prompt: str, draw: Callable[[], Mapping[int, Any]]) -> int:
    folder.mkdir()
    if folder.name != prompt:
        _write_text(folder / NOTE, prompt)
    pictures = draw()
    for seed, picture in pictures.items():
        path = folder / f"{seed}.png"
        picture.save(path)
        sync(path)
    sync(folder)
    return len(pictures)


def _write_text(path: Path, text: str) -> None:
    path.write_text(f"{text}\n", encoding="utf-8")
    sync(path)
