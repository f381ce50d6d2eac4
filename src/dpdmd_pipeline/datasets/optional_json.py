"""A JSON file that a stage can do without."""

from __future__ import annotations

import logging
from typing import Any

from dpdmd_pipeline.datasets.whole_file import JSONDataset

log = logging.getLogger(__name__)


class OptionalJSONDataset(JSONDataset):
    """A JSON object that is {} while its file is missing, so that a run that reads it is not refused.

    `exists` reports the file's real state; the reader decides what a missing file means.
    """

    optional = True  # read by the hook that refuses missing inputs

    def load(self) -> Any:
        if self.exists():
            return super().load()
        log.info("%s does not exist: read as empty", self._filepath)
        return {}
