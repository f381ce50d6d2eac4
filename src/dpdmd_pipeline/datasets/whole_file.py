"""Kedro's datasets of one file, saved as a whole: a kill leaves the old file, and DVC's cache keeps its content.

Kedro's own write in place. They tear the file if the process is killed, and write through the links into its cache
that DVC makes with `cache.type symlink` or `hardlink`.
"""

from __future__ import annotations

import logging
from copy import copy
from pathlib import Path, PurePosixPath
from typing import Any

from kedro_datasets import json, pillow, text

from dpdmd_pipeline.publishing import write_atomically, writing

log = logging.getLogger(__name__)


class WholeFile:
    """Mixin for a dataset of kedro_datasets, left of it among the bases; the bytes it writes stay the same."""

    def save(self, data: Any) -> None:
        def write(path: Path) -> None:
            beside = copy(self)
            beside._filepath = PurePosixPath(path)
            super(WholeFile, beside).save.__wrapped__(beside, data)  # without Kedro's wrapper: it hides OSErrors

        if self._version or self._protocol != "file":  # a new file, or a store that replaces whole objects
            return super().save.__wrapped__(self, data)
        path = Path(self._filepath)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, write, path.with_name(f".{path.stem}.tmp{path.suffix}"))  # the suffix is the format


class JSONDataset(WholeFile, json.JSONDataset):
    """A value as JSON."""


class OptionalJSONDataset(JSONDataset):
    """A JSON object that is {} while its file is missing; `exists` reports the file's real state."""

    optional = True  # read by the hook that refuses missing inputs

    def load(self) -> Any:
        if self.exists():
            return super().load()
        log.info("%s does not exist: read as empty", self._filepath)
        return {}


class TextDataset(WholeFile, text.TextDataset):
    """A string as a file."""


class ImageDataset(WholeFile, pillow.ImageDataset):
    """A Pillow picture, in the format of the file's suffix."""
