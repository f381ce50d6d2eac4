"""Base of the datasets that are folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from dpdmd_pipeline.publishing import Folders, locked, recover


class FolderDataset(AbstractDataset[Any, Any]):
    """A folder in the catalog; loads its path.

    Args:
        filepath: the folder, or a link to a folder on another disk.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    @property
    def _folders(self) -> Folders:
        return Folders.of(self._filepath)

    def load(self) -> Any:
        folders = self._folders
        if not folders.published.exists() and folders.ready.exists():  # all that a kill left is the next version
            with locked(folders):
                recover(folders)
        if not folders.published.exists():
            raise FileNotFoundError(f"{folders.published} does not exist: run the stage that writes it first")
        return folders.published

    def _exists(self) -> bool:
        return self._folders.published.exists() or self._folders.ready.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}
