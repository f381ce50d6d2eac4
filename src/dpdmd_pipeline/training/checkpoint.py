"""Exact resume: checkpoints that are whole or absent."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Checkpoints:
    """The last few states of one run, in a folder of its own.

    A state is one file and a small manifest with its hash, each written beside its place and renamed;
    the manifest comes last, so a kill at any moment leaves the previous state the newest whole one.
    """

    def __init__(self, folder: Path, keep_last: int = 2) -> None:
        self.folder = Path(folder)
        self.keep_last = keep_last

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step` steps and drop all but the newest `keep_last`.

        Args:
            step: number of finished steps.
            state: of tensors, numbers, strings, and containers of these.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        target = self.folder / f"step_{step:07d}.pt"
        partial = target.with_suffix(".partial")
        torch.save(state, partial)
        digest = _sha256(partial)
        os.replace(partial, target)
        manifest = target.with_suffix(".json")
        partial.write_text(json.dumps({"step": step, "sha256": digest}))
        os.replace(partial, manifest)
        for old in self._manifests()[: -self.keep_last]:
            old.unlink()
            old.with_suffix(".pt").unlink(missing_ok=True)

    def load_latest(self, map_location: Any = "cpu") -> tuple[int, dict[str, Any]] | None:
        """The newest whole state as (step, state); None if there is none.

        A state that does not match its hash is passed over with a warning.
        """
        for manifest in reversed(self._manifests()):
            path = manifest.with_suffix(".pt")
            try:
                record = json.loads(manifest.read_text())
                if _sha256(path) != record["sha256"]:
                    raise ValueError("its content does not match its hash")
                return record["step"], torch.load(path, map_location=map_location, weights_only=True)
            except (OSError, ValueError, KeyError) as error:
                log.warning("checkpoint %s is damaged (%s): falling back to the one before", path, error)
        return None

    def latest_step(self) -> int | None:
        """Steps of the newest state by its name; None if there is none."""
        manifests = self._manifests()
        return int(manifests[-1].stem.removeprefix("step_")) if manifests else None

    def _manifests(self) -> list[Path]:
        return sorted(self.folder.glob("step_*.json"))
