"""Rows of a cache, read when they are needed."""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dpdmd_pipeline.datasets.sharded.files import Tensors, cache_identity, is_intact, repair_hint, shard_path


class ShardedTensors:
    """A cache on disk: rows by random access, or shard after shard.

    Attributes:
        manifest: the facts that were stored beside the shards.
        fingerprint: of everything that decided the content.
        tensors: name -> {"dtype": name of torch, "shape": of a row of the first shard}.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.manifest: dict[str, Any] = record["manifest"]
        self.fingerprint: str = record["fingerprint"]
        self.tensors: dict[str, dict[str, Any]] = record["tensors"]
        self._folder = folder
        self._entries: list[dict[str, Any]] = record["shards"]
        self._ends = list(accumulate(shard["rows"] for shard in self._entries))
        self._identity = cache_identity(self.fingerprint, [shard["name"] for shard in self._entries])
        self._mapped: dict[int, Tensors] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # mapped files stay with their process

    def rows(self, indices: Sequence[int]) -> Tensors:
        """Read the rows at `indices` (from 0) in that order, duplicates included.

        The first row of a shard reads all of it, for its checksum.

        Returns:
            Name -> tensor [len(indices), ...], as stored.

        Raises:
            ValueError: if a shard is damaged, or the cache on disk was replaced since it was loaded.
        """
        import torch

        positions = [self._position(operator.index(index)) for index in indices]
        if not positions:
            return {
                name: torch.empty([0, *spec["shape"]], dtype=getattr(torch, spec["dtype"]))
                for name, spec in self.tensors.items()
            }
        for shard in {shard for shard, _ in positions}.difference(self._mapped):
            self._mapped[shard] = self._map(shard)
        return {
            name: torch.stack([self._mapped[shard][name][row] for shard, row in positions]) for name in self.tensors
        }

    def shards(self) -> Iterator[Tensors]:
        """Read shard after shard, each name -> tensor [rows, ...]; one in memory at a time."""
        for shard in range(len(self._entries)):
            yield self._map(shard)  # not from `_mapped`: the caller may write into these

    def _position(self, index: int) -> tuple[int, int]:
        """Number of the shard that holds a row, and the row's index in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self._folder}, which has {len(self)} rows, counted from 0")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _map(self, shard: int) -> Tensors:
        """Verify a shard and map its tensors into memory: the system reads a page when it is touched."""
        path = shard_path(self._folder, self._entries[shard]["name"])
        try:
            file = safe_open(path, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(
                f"{path} was damaged since it was loaded ({error}): {repair_hint(self._folder)}"
            ) from error
        if (file.metadata() or {}).get("cache") != self._identity:
            raise ValueError(f"{path} was replaced by another cache since it was loaded: run again")
        if not is_intact(path, self._entries[shard]):
            raise ValueError(f"{path} does not have the SHA-256 of its manifest: {repair_hint(self._folder)}")
        return {name: file.get_tensor(name) for name in self.tensors}
