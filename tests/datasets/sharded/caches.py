"""Small caches, whole and interrupted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, fingerprint

NUM_SHARDS = 6
ROWS = (4, 1, 3, 5, 2, 4)
LOGGER = "dpdmd_pipeline.datasets.sharded"
ROOT = str(Path(__file__).parents[3])  # of the project, for programs that import this module


def make_shard(number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + number)
    return {
        "anchor_0": torch.randn(ROWS[number], 3, 2, generator=generator).bfloat16(),
        "prompt": torch.arange(ROWS[number]) + 10 * number,
        "image": torch.randint(0, 256, (ROWS[number], 2), generator=generator, dtype=torch.uint8),
    }


def lazy_shards(seed: int = 0, calls: list[int] | None = None, names: list[str] | None = None) -> LazyShards:
    """A cache of six shards; `calls` gets the number of each shard that is computed."""
    calls = [] if calls is None else calls

    def thunk(number: int):
        return lambda: calls.append(number) or make_shard(number, seed)

    names = names or [f"{number:05d}" for number in range(NUM_SHARDS)]
    shards = {name: thunk(number) for number, name in enumerate(names)}
    return LazyShards(shards, fingerprint("test", seed), {"seed": seed})


def shards_of_two(shards: dict | None = None, machines: int = 1, rendezvous: str | None = None) -> LazyShards:
    """The cache of `lazy_shards`, to be computed by two processes."""
    from dpdmd_pipeline.training.launch_options import LaunchOptions

    whole = lazy_shards()
    launch = LaunchOptions(processes=2 // machines, machines=machines, rendezvous=rendezvous)
    thunks = {name: partial(make_shard, number) for number, name in enumerate(whole.shards)}
    return LazyShards(thunks | (shards or {}), whole.fingerprint, whole.manifest, launch.of_shards("test", "cpu"))


def save_counted(dataset: ShardedDataset, **changes) -> list[int]:
    """Save the cache of `lazy_shards`; returns the numbers of the shards that were computed."""
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls, **changes))
    return calls


def load_all(dataset: ShardedDataset) -> dict[str, torch.Tensor]:
    shards = list(dataset.load().shards())
    return {name: torch.cat([shard[name] for shard in shards]) for name in shards[0]}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_beside(folder: Path) -> list[str]:
    """Names in the folder that holds a cache."""
    return sorted(path.name for path in folder.parent.iterdir())


def truncate(path: Path, size: int = 40) -> None:
    with path.open("r+b") as file:
        file.truncate(size)
