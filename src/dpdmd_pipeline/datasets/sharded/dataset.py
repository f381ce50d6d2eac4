"""The Kedro dataset of a sharded cache."""

from __future__ import annotations

from dpdmd_pipeline.datasets.folder import FolderDataset
from dpdmd_pipeline.datasets.sharded.lazy import LazyShards
from dpdmd_pipeline.datasets.sharded.manifest import MANIFEST, find_damage, read_manifest, repair_hint
from dpdmd_pipeline.datasets.sharded.reading import ShardedTensors
from dpdmd_pipeline.datasets.sharded.writing import write_cache


class ShardedDataset(FolderDataset):
    """Tensors larger than memory: saved shard by shard, resumable, published as a whole."""

    def load(self) -> ShardedTensors:
        """Check the manifest and every shard's header and size; read no rows yet.

        Raises:
            FileNotFoundError: if there is no cache.
            ValueError: if it is damaged, or another version of the format.
        """
        folder = self._load_folder()
        record = read_manifest(folder)
        damage = f"{folder / MANIFEST} is missing or unreadable" if record is None else find_damage(folder, record)
        if damage:
            raise ValueError(f"{damage}: {repair_hint(folder)}")
        return ShardedTensors(folder, record)

    def save(self, data: LazyShards) -> None:
        """Write what is missing and publish; see `write_cache`."""
        write_cache(data, self._folders)

    def _exists(self) -> bool:
        return (self._folders.published / MANIFEST).is_file() or self._folders.ready.exists()
