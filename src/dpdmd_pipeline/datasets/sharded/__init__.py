"""A cache of tensors larger than memory: a folder of safetensors shards and a manifest.

    anchors/                     published as a whole (`publishing`)
        00000.safetensors ...    rows; the manifest lists the shards in their order
        manifest.json            {version, fingerprint, shards, tensors, manifest}

Every shard carries the identity of its cache in its header, so an interrupted run recognises its complete shards by
themselves.
"""

from dpdmd_pipeline.datasets.sharded.dataset import ShardedDataset
from dpdmd_pipeline.datasets.sharded.lazy import LastLoaded, LazyShards
from dpdmd_pipeline.datasets.sharded.manifest import fingerprint
from dpdmd_pipeline.datasets.sharded.reading import ShardedTensors

__all__ = ["LastLoaded", "LazyShards", "ShardedDataset", "ShardedTensors", "fingerprint"]
