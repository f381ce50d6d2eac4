"""Checkpoints for an exact resume: each is complete or absent."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.publishing import Folders, locked, sha256, write_atomically, writing

log = logging.getLogger(__name__)

LOSSES = "losses.jsonl"  # a record per cycle


@dataclass
class Checkpoints:
    """The last few states of one run, in a folder of its own.

    A state is one file and then a small manifest with its hash, each written atomically: a kill at any moment leaves
    the previous state as the newest complete one.
    """

    folder: Path
    keep_last: int = 2

    def save(self, step: int, state: dict[str, Any], *, finished: bool = False) -> None:
        """Write the state after `step` steps and delete all but the newest `keep_last`; if `finished`, all others.

        A state has tensors, numbers, strings, and containers of these.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._manifest(step).with_suffix(".pt")
        write_atomically(path, partial(torch.save, state))
        manifest = json.dumps({"step": step, "sha256": sha256(path)})
        write_atomically(self._manifest(step), lambda temporary: temporary.write_text(manifest))
        for old in self._manifests()[: -1 if finished else -self.keep_last]:
            old.with_suffix(".pt").unlink(missing_ok=True)
            old.unlink()

    def write_losses(self, records: Iterable[dict[str, float]], *, anew: bool = False) -> None:
        """Append the records of cycles to a file of JSON lines, so that a kill loses none; `anew` replaces the file."""
        path = self.folder / LOSSES
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w" if anew else "a") as file:
                file.writelines(f"{json.dumps(record)}\n" for record in records)

    def locked(self) -> AbstractContextManager[None]:
        """Keep other processes from training the same run; raises a LockedError that names a process that does."""
        return locked(Folders.of(self.folder))

    def load_latest(self, map_location: Any = "cpu") -> tuple[int, dict[str, Any]] | None:
        """Newest complete state as (step, state); None if there is none.

        Its tensors are mapped from the file: copy those that must outlive it. A state that does not match its hash is
        skipped with a warning.
        """
        for manifest in reversed(self._manifests()):
            path = manifest.with_suffix(".pt")
            try:
                record = json.loads(manifest.read_text())
                if sha256(path) != record["sha256"]:
                    raise ValueError("its content does not match its hash")
                # mapped, so that the processes of a machine share the pages they read
                return record["step"], torch.load(path, map_location=map_location, weights_only=True, mmap=True)
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, error)
        return None

    def holds(self, step: int) -> bool:
        """True if there is a state after `step` steps; its content is not checked."""
        return self._manifest(step).is_file()

    def _manifest(self, step: int) -> Path:
        return self.folder / f"step_{step:07d}.json"

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))
