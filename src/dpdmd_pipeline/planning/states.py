"""Folders of checkpoints: each belongs to one identity, and holds the options that decide it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from dpdmd_pipeline.publishing import folder_size, write_atomically
from dpdmd_pipeline.wording import differences, unused

log = logging.getLogger(__name__)

RECORD = "options.json"


def state_folder(states: Path, identity: str) -> Path:
    """Folder of the checkpoints of one identity, among those of all."""
    return states / identity[:16]


def open_state(states: Path, identity: str, name: str, options: Mapping[str, Any], last: int | None = None) -> Path:
    """Make a run's folder of checkpoints; if it is new, warn of an unfinished one with other options or code.

    Args:
        states: folder of all states.
        identity: of the run.
        name: of what is trained; states of other names are other work.
        options: nested and JSON-able, all that decides the identity but the code.
        last: step after which the work is finished; None if it has several parts.
    """
    folder = state_folder(states, identity)
    if (folder / RECORD).is_file():
        return folder
    if not folder.exists() and (unfinished := _unfinished(states, name)):
        other, progress, record = unfinished[-1]
        changes = [*differences(record["options"], options)]
        log.warning("%s: %s", name, unused(f"{other} after {progress}", folder_size(other), changes))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": name, "last": last, "options": options})
    temporary = folder / f"{RECORD}.{os.getpid()}.tmp"  # several machines may write it
    write_atomically(folder / RECORD, lambda path: path.write_text(text), temporary)
    return folder


def _unfinished(states: Path, name: str) -> list[tuple[Path, str, dict[str, Any]]]:
    """Folder, progress and record of each unfinished state of a name, the newest last."""
    unfinished = []
    for path in sorted(states.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime):
        with suppress(ValueError, OSError, KeyError, TypeError):  # a damaged record tells nothing
            record = json.loads(path.read_text())
            step = max((int(file.stem[5:]) for file in path.parent.rglob("step_*.json")), default=0)
            if record["name"] == name and step and step != record["last"]:
                of = f" of {record['last']}" if record["last"] else ""
                unfinished.append((path.parent, f"step {step}{of}", record))
    return unfinished
