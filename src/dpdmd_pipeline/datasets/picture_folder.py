"""Pictures of prompts as files, in the layout that `dpdmd-pipeline score` and `arena` read.

samples/
    a red circle/            a folder per prompt, named after it
        0.png 1.png ...      a picture per seed
    00001_a-cat-a-dog/       if the prompt cannot be a folder's name: "A cat / a dog"
        prompt.txt           the prompt
        0.png 1.png ...
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.folder import FolderDataset
from dpdmd_pipeline.publishing import replacing

log = logging.getLogger(__name__)

NOTE = "prompt.txt"
EMPTY = "empty.txt"  # DVC needs a file in a folder
_MAX_BYTES = 150  # of a folder's name; file systems take 255
_RESERVED = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # on some system
_NUMBERED = re.compile(r"\d{5}_")


class PictureFolderDataset(FolderDataset):
    """Pictures by prompt and seed: saves functions that make them, one prompt in memory at a time; loads the path."""

    def save(self, data: Mapping[str, Any]) -> None:
        """Replace the folder.

        Args:
            data: prompt -> function without arguments that returns seed -> picture (Pillow); or name of a subfolder
                -> such a mapping. An empty mapping leaves a folder with a note in it.
        """
        with replacing(self._folders) as folder:
            count = _write(folder, data)
        if count:
            log.info("%s: %d pictures saved", self._folders.published.name, count)


def folder_names(prompts: Iterable[str]) -> dict[str, str]:
    """Name of a folder for each prompt: the prompt itself, or else its number and a slug.

    The slug replaces names with reserved characters, and names that some disks do not tell apart.
    """
    names: dict[str, str] = {}
    used: set[str] = set()
    for number, prompt in enumerate(prompts):
        is_usable = _is_name(prompt) and prompt.casefold() not in used  # some disks take A for a
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower())[:40].strip("-") or "prompt"
        names[prompt] = prompt if is_usable else f"{number:05d}_{slug}"
        used.add(names[prompt].casefold())
    return names


def _is_name(prompt: str) -> bool:
    fits = 0 < len(prompt.encode()) <= _MAX_BYTES and prompt == prompt.strip(" .")  # a leading dot hides the folder
    is_text = " " in prompt or not re.search(r"\d", prompt)  # `score` takes other names for ids
    return fits and is_text and not _RESERVED.search(prompt) and not _NUMBERED.match(prompt)


def _write(folder: Path, data: Mapping[str, Any]) -> int:
    """Fill an empty folder; returns the number of pictures."""
    names = folder_names(name for name, value in data.items() if callable(value))
    count = 0
    for name, value in data.items():
        if callable(value):
            count += _write_prompt(folder / names[name], name, value)
        else:
            (folder / name).mkdir()
            count += _write(folder / name, value)
    if not data:
        (folder / EMPTY).write_text("No pictures were asked for.\n", encoding="utf-8")
    return count


def _write_prompt(folder: Path, prompt: str, draw: Callable[[], Mapping[int, Any]]) -> int:
    folder.mkdir()
    if folder.name != prompt:
        (folder / NOTE).write_text(f"{prompt}\n", encoding="utf-8")
    pictures = draw()
    for seed, picture in pictures.items():
        picture.save(folder / f"{seed}.png")
    return len(pictures)
