"""Model folders as diffusers writes them, replaced as a whole; and a scratch folder for training states."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from dpdmd_pipeline.publishing import Folders, load_published, replacing, sync, writing

log = logging.getLogger(__name__)

_CONFIGS = ("model_index.json", "config.json", "open_clip_config.json")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the *.safetensors and *.json files of a folder, hexadecimal.

    The same for a copy elsewhere, another time stamp, or other files beside these.

    Raises:
        FileNotFoundError: if the folder holds no such file.
    """
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.suffix in (".safetensors", ".json") and path.is_file()
    }
    if not paths:
        raise FileNotFoundError(f"{folder} holds no *.safetensors and no *.json: it is no model folder")
    digest = hashlib.sha256()
    for name, path in sorted(paths.items()):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


class ModelFolderDataset(AbstractDataset[Any, Path]):
    """A model on disk. Saves what can write itself into a folder, loads the path.

    Args:
        filepath: the folder.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        """The folder, which holds a model_index.json, a config.json or an open_clip_config.json.

        Raises:
            FileNotFoundError: if it does not.
        """
        folders = Folders.of(self._filepath)
        folder = load_published(folders)
        if folder is None or not _is_model(folder):
            state = "holds no " + " or ".join(_CONFIGS) if folder else "does not exist"
            raise FileNotFoundError(
                f"{folders.published} {state}: run the stage that writes it, or put a diffusers model folder there"
            )
        return folder

    def save(self, data: Any) -> None:
        """Write beside the old folder and take its place; killed at any moment, one of the two is whole.

        Args:
            data: has `save_pretrained(folder)`, or is a function that writes into the folder it is given.

        Raises:
            ValueError: if it is neither, if it wrote no model, or if another process is writing.
            OSError: naming the path, if it cannot be written.
        """
        write = _writer(data)
        folders = Folders.of(self._filepath)
        with replacing(folders) as folder:
            write(folder)
            if not _is_model(folder):
                raise ValueError(f"{data!r:.100} wrote no {' or '.join(_CONFIGS)} into {folder}")
            _sync_tree(folder)
        log.info("%s: saved", folders.published.name)

    def _exists(self) -> bool:
        folders = Folders.of(self._filepath)
        return _is_model(folders.published) or _is_model(folders.ready)

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


class ScratchFolderDataset(AbstractDataset[Any, Path]):
    """A folder that belongs to one stage between its runs, as for its checkpoints. Loads the path.

    Args:
        filepath: the folder, which is created on loading.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> Path:
        with writing(self._filepath):
            self._filepath.mkdir(parents=True, exist_ok=True)
        return self._filepath

    def save(self, data: Any) -> None:
        raise ValueError(f"{self._filepath} is a scratch folder: a stage writes into it itself, nothing is saved to it")

    def _exists(self) -> bool:
        return True

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _CONFIGS)


def _writer(data: Any) -> Callable[[Path], Any]:
    if hasattr(data, "save_pretrained"):
        return data.save_pretrained
    if callable(data):
        return data
    raise ValueError(f"a model folder saves a model or a function of a folder, it was given {type(data).__name__}")


def _sync_tree(folder: Path) -> None:
    """Bring every file below a folder, and the names, to the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            sync(Path(parent, name))
        sync(Path(parent))
