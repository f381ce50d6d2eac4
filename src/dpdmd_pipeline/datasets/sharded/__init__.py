"""A cache of tensors larger than memory: a folder of safetensors shards and a manifest.

    anchors/                     published as a whole (`publishing`)
        00000.safetensors ...    rows; the manifest lists the shards in their order
        manifest.json            {version, fingerprint, shards, tensors, manifest}

Every shard carries the identity of its cache in its header, so an interrupted run recognises its complete shards by
themselves. The manifest has a checksum of each shard: a run verifies it when it first reads the shard, and the stage
that writes the cache when it would reuse it.
"""

from __future__ import annotations

from dpdmd_pipeline.datasets.folder import FolderDataset
from dpdmd_pipeline.datasets.sharded.files import MANIFEST, find_damage, fingerprint, read_manifest, repair_hint
from dpdmd_pipeline.datasets.sharded.reading import ShardedTensors
from dpdmd_pipeline.datasets.sharded.writing import LastLoaded, LazyShards, write_cache

__all__ = ["LastLoaded", "LazyShards", "ShardedDataset", "ShardedTensors", "fingerprint"]


class ShardedDataset(FolderDataset):
    """Tensors larger than memory: saved shard by shard, resumable, published as a whole."""

    def load(self) -> ShardedTensors:
        """Check the manifest and every shard's header and size; read no rows yet."""
        folder = super().load()
        record = read_manifest(folder)
        damage = f"{folder / MANIFEST} is missing or unreadable" if record is None else find_damage(folder, record)
        if damage:
            raise ValueError(f"{damage}: {repair_hint(folder)}")
        return ShardedTensors(folder, record)

    def save(self, data: LazyShards) -> None:
        write_cache(data, self._folders)

    def _exists(self) -> bool:
        return (self._folders.published / MANIFEST).is_file() or self._folders.ready.exists()
