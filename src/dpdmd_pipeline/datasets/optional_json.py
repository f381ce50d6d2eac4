"""JSON that a stage can do without."""

from __future__ import annotations

import logging
from typing import Any

from kedro_datasets.json import JSONDataset

log = logging.getLogger(__name__)


class OptionalJSONDataset(JSONDataset):
    """A JSON object that is {} as long as no stage has written it: a run that reads it is not refused for that.

    Whether it exists is told as it is. Who reads it says what it makes of nothing.
    """

    optional = True  # read by the hook that refuses missing inputs

    def load(self) -> Any:
        if self.exists():
            return super().load()
        log.info("%s is not there: read as empty", self._filepath)
        return {}
