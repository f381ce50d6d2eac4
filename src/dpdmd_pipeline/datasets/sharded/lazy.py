"""A node's result that is computed while it is saved: shards as functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dpdmd_pipeline.datasets.sharded.manifest import fingerprint
from dpdmd_pipeline.datasets.sharded.shard import Tensors


class Member(Protocol):
    """One of the processes that write a cache; see `training.launch.Member`."""

    rank: int
    size: int

    def end_at_once(self) -> None: ...

    def gather(self, value: Any) -> list[Any]: ...

    def report(self, record: dict[str, Any]) -> None: ...


# (work, job that can be pickled) -> reports of rank 0, while every process runs work(job, member)
Launch = Callable[[Callable[[Any, Member], bool], Any], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class LazyShards:
    """A cache that is computed shard by shard, and only where a shard is missing.

    Attributes:
        shards: name -> thunk, in the order of the rows. A thunk returns tensors [rows, ...] with the
            same number of rows, the same names, dtypes and row shapes in every shard. Thunks are
            called one at a time, and not at all for shards that exist already.
        fingerprint: of everything that decides the content.
        manifest: JSON-able facts, stored beside the shards.
        launch: starts the processes that share the shards; None for this process alone. With it, thunks must be
            picklable.
    """

    shards: Mapping[str, Callable[[], Tensors]]
    fingerprint: str
    manifest: dict[str, Any]
    launch: Launch | None = None


def check_lazy_shards(data: Any) -> None:
    """Refuse before the first shard what would otherwise fail after the last.

    Raises:
        ValueError: if it is no LazyShards, a name is no plain file name, or the manifest is not JSON.
    """
    if not isinstance(data, LazyShards):
        raise ValueError(f"a sharded dataset saves LazyShards, got {type(data).__name__}")
    for name in data.shards:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"shard name {name!r} must be a plain file name: not empty, no slash, no leading dot")
    fingerprint(data.manifest)


class LastLoaded:
    """Call `load` on first use and keep its last result, for the thunks of one process to share.

    Args:
        load: picklable; its result stays with its process.
    """

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load, self._key, self._value = load, None, None

    def __call__(self, *key: Any) -> Any:
        if self._key != key:
            self._key = self._value = None  # free the old value before loading the next
            self._value, self._key = self._load(*key), key
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_key": None, "_value": None}
