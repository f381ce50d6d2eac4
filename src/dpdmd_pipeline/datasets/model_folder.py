"""Model folders as diffusers writes them, replaced as a whole; and scratch folders for checkpoints."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.folder import FolderDataset
from dpdmd_pipeline.publishing import files_hash, replacing, writing

log = logging.getLogger(__name__)

_CONFIGS = ("model_index.json", "config.json", "open_clip_config.json")


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of the *.safetensors and *.json files of a folder, hexadecimal.

    Copies elsewhere, other time stamps and other files beside these do not change it.
    """
    paths = [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".json") and path.is_file()]
    if not paths:
        raise FileNotFoundError(f"{folder} is not a model folder: it has no *.safetensors and no *.json")
    return files_hash(folder, paths)


class ModelFolderDataset(FolderDataset):
    """A model on disk: saves an object that can write itself into a folder, loads the folder's path."""

    def load(self) -> Path:
        """Path of the folder, which has a model_index.json, a config.json or an open_clip_config.json."""
        folder = super().load()
        if not _is_model(folder):
            raise FileNotFoundError(
                f"{folder} has no {' or '.join(_CONFIGS)}: run the stage that writes it, or put a diffusers model there"
            )
        return folder

    def save(self, data: Any) -> None:
        """Replace the folder by what `data.save_pretrained`, or the function `data`, writes into the path it gets."""
        write = getattr(data, "save_pretrained", data)
        if not callable(write):
            raise ValueError(f"a model folder saves a model or a function of a folder, got {type(data).__name__}")
        with replacing(self._folders) as folder:
            write(folder)
            if not _is_model(folder):
                raise ValueError(f"{data!r:.100} wrote no {' or '.join(_CONFIGS)} into {folder}")
        log.info("%s: saved", self._folders.published.name)

    def _exists(self) -> bool:
        return _is_model(self._folders.published) or _is_model(self._folders.ready)


class FinishedModelDataset(ModelFolderDataset):
    """The model of an earlier run or of `dvc pull`, which the stage that writes this folder may reuse; never saved."""

    optional = True  # the check of missing inputs reads it

    def load(self) -> Path | None:
        """Path of the folder; None if there is no model."""
        return super().load() if self._exists() else None

    def save(self, data: Any) -> None:
        raise ValueError(f"{self._folders.published} is read here: save it under the dataset's other name")


class ScratchFolderDataset(FolderDataset):
    """A folder that one stage keeps between its runs, as for checkpoints; loading creates it and gives its path."""

    def load(self) -> Path:
        with writing(self._filepath):
            self._filepath.mkdir(parents=True, exist_ok=True)
        return self._filepath

    def save(self, data: Any) -> None:
        raise ValueError(f"{self._filepath} is a scratch folder: its stage writes into it, nothing can be saved to it")

    def _exists(self) -> bool:
        return True


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _CONFIGS)
