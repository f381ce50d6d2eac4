"""Write a cache, which a node returns as functions: reuse complete shards, compute the missing ones, publish the whole.

Several processes share the missing shards, one shard each per round. At every moment they leave the same files as one
process would, so any number of processes can resume.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dpdmd_pipeline.datasets.sharded.files import (
    MANIFEST,
    Tensors,
    cache_identity,
    find_damage,
    fingerprint,
    is_intact,
    read_header,
    read_manifest,
    shard_path,
    write_manifest,
    write_shard,
)
from dpdmd_pipeline.publishing import Folders, folder_size, locked, publish, recover, sha256, writing
from dpdmd_pipeline.wording import counted, differences, made, reuse_refusal

log = logging.getLogger(__name__)

_VISIBLE_WITHIN = 60  # seconds; a shared file system may show late what another machine wrote

_ALONE = SimpleNamespace(rank=0, size=1, gather=lambda value: [value])  # like the `Member` of several processes

# (work, job that can be pickled) -> reports of rank 0, while every process runs work(job, `training.launch.Member`)
Launch = Callable[[Callable[[Any, Any], bool], Any], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class LazyShards:
    """A cache that is computed shard by shard, and only where a shard is missing.

    Attributes:
        shards: name -> thunk, in the order of the rows. A thunk returns tensors [rows, ...] with the same number of
            rows; their names, dtypes and row shapes are the same in every shard. Thunks are called one at a time, and
            not at all for shards that exist already.
        fingerprint: of everything that decides the content.
        manifest: JSON-able facts, stored beside the shards.
        launch: starts the processes that share the shards; None for this process alone. With it, thunks must be
            picklable.
        one_shape: False if the row shapes may differ between shards; then rows can be read together within one shape.
    """

    shards: Mapping[str, Callable[[], Tensors]]
    fingerprint: str
    manifest: dict[str, Any]
    launch: Launch | None = None
    one_shape: bool = True


class LastLoaded:
    """Call `load`, which can be pickled, on first use and keep its last result, for one process's thunks to share."""

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load, self._key, self._value = load, None, None

    def __call__(self, *key: Any) -> Any:
        if self._key != key:
            self._key = self._value = None  # free the old value before loading the next
            self._value, self._key = self._load(*key), key
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_key": None, "_value": None}


# ---- writing


def write_cache(data: LazyShards, folders: Folders) -> None:
    """Write the missing shards and publish; a whole cache of the same fingerprint stays as it is.

    Raises:
        ValueError: if shards disagree in names, dtypes or shapes, if another process is writing,
            or if the folder holds something that is not a cache.
        OSError: if the cache cannot be written; names the path. Finished shards are kept.
    """
    _check(data)
    if data.launch is not None and data.shards:
        if not _is_published(data, folders):
            with closing(data.launch(_write_share, (replace(data, launch=None), folders))) as reports:
                _log_shards(data, folders, reports)
        return
    with locked(folders):
        recover(folders)
        if not _is_published(data, folders):
            _log_shards(data, folders, _write_missing(data, folders, _ALONE))


def _check(data: Any) -> None:
    """Refuse before the first shard what would otherwise fail after the last."""
    if not isinstance(data, LazyShards):
        raise ValueError(f"a sharded dataset saves LazyShards, got {type(data).__name__}")
    for name in data.shards:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"shard name {name!r} must be a plain file name: not empty, no slash, no leading dot")
    fingerprint(data.manifest)


def _write_share(job: tuple[LazyShards, Folders], member: Any) -> bool:
    """Do the work of one of many processes; returns True. Rank 0, on whichever machine, holds the lock."""
    data, folders = job
    member.end_at_once()  # safe at any moment: a shard is complete or absent
    with locked(folders) if member.rank == 0 else nullcontext():
        if member.rank == 0:
            recover(folders)
        for report in _write_missing(data, folders, member):
            member.report(report)
    return True


def _write_missing(data: LazyShards, folders: Folders, member: Any) -> Iterator[dict[str, Any]]:
    """Share the shards in rounds, so that all processes soon notice the end of one.

    Rank 0 publishes, and yields a report of each finished shard.
    """
    identity = cache_identity(data.fingerprint, list(data.shards))
    names, *_ = member.gather(_reuse_shards(data, folders, identity) if member.rank == 0 else None)
    _wait_until_visible(folders.partial)
    entries: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}  # of the first shard: name -> dtype, shape of a row
    for start in range(0, len(names), member.size):
        own_names = names[start + member.rank : start + member.size][:1]
        shards = chain(*member.gather([_finish_shard(data, folders, identity, name) for name in own_names]))
        for entry, shard_tensors, action in shards if member.rank == 0 else []:
            path = shard_path(folders.partial, entry["name"])
            _wait_until_visible(path)
            tensors = tensors or shard_tensors
            if not data.one_shape:
                entry["tensors"] = shard_tensors
            elif shard_tensors != tensors:
                path.unlink()
                shard = f"shard {entry['name']} of {folders.published.name}"
                raise ValueError(f"{shard} has tensors {shard_tensors}, shards before it {tensors}")
            entries[entry["name"]] = entry
            yield {"name": entry["name"], "action": action, "rows": entry["rows"]}
    if member.rank == 0:
        ordered = [entries[name] for name in data.shards]
        _write_record(data, folders, ordered, ordered[0].get("tensors", tensors) if ordered else tensors)
        publish(folders)


def _write_record(data: LazyShards, folders: Folders, shards: list[dict[str, Any]], tensors: dict[str, Any]) -> None:
    record = {"fingerprint": data.fingerprint, "shards": shards, "tensors": tensors, "manifest": data.manifest}
    write_manifest(folders.partial, record)


def _is_published(data: LazyShards, folders: Folders) -> bool:
    """True if the published cache is this one and whole; logs that it is reused, or its damage.

    A folder that another version wrote, or that is no cache at all, is refused: it would be deleted.
    """
    folder, names = folders.published, list(data.shards)
    if not folder.exists():
        return False
    record = read_manifest(folder)
    if record is None:
        foreign = [path.name for path in folder.iterdir() if not path.name.endswith((".safetensors", ".tmp", MANIFEST))]
        if foreign:
            raise ValueError(f"{folder} is not a cache (no {MANIFEST}, but {foreign[0]!r}): move it away and run again")
        log.warning("%s: %s is missing or unreadable, repairing", folder.name, MANIFEST)
        return False
    if record["fingerprint"] != data.fingerprint or [shard["name"] for shard in record["shards"]] != names:
        return False
    if damage := find_damage(folder, record, rows=True):
        log.warning("%s: %s; repairing", folder.name, damage)
    else:
        log.info("%s: reused (%d shards)", folder.name, len(data.shards))
        made.info("%s reused", folder.name)
    return damage is None


def _reuse_shards(data: LazyShards, folders: Folders, identity: str) -> list[str]:
    """Leave exactly the complete shards of this cache in the partial folder; returns all names, theirs first."""
    file_names = {shard_path(folders.partial, name).name for name in data.shards}

    def is_reusable(path: Path) -> bool:
        header = read_header(path) if path.name in file_names else None
        return header is not None and header.cache == identity

    with writing(folders.partial):
        folders.partial.mkdir(parents=True, exist_ok=True)
        for path in folders.partial.iterdir():
            if not is_reusable(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if folders.published.exists():  # a damaged cache gives its complete shards
            record = read_manifest(folders.published) or {"shards": []}
            entries = {shard_path(folders.published, shard["name"]): shard for shard in record["shards"]}
            for path in sorted(folders.published.iterdir()):
                if is_reusable(path) and is_intact(path, entries.get(path, {})):
                    os.replace(path, folders.partial / path.name)
    _write_record(data, folders, [], {})  # a later run with other options can tell what it deletes
    return sorted(data.shards, key=lambda name: not shard_path(folders.partial, name).exists())


def _finish_shard(data: LazyShards, folders: Folders, identity: str, name: str) -> tuple[dict[str, Any], Any, str]:
    """Compute and write a shard unless it exists; returns its entry in the manifest, its tensors and the action."""
    path = shard_path(folders.partial, name)
    action = "kept" if path.exists() else "written"
    if action == "written":
        write_shard(path, data.shards[name](), identity)
    header = read_header(path)
    entry = {"name": name, "rows": header.rows, "bytes": header.bytes, "sha256": sha256(path)}
    return entry, header.tensors, action


def _log_shards(data: LazyShards, folders: Folders, reports: Iterator[dict[str, Any]]) -> None:
    """Log the cache or the unfinished one that is replaced, if it differs, and then each shard."""
    for folder in (folders.published, folders.partial):
        record, shards = read_manifest(folder), len([*folder.glob("*.safetensors")])
        if record and record["fingerprint"] != data.fingerprint and shards:
            changes = [*differences(record["manifest"], data.manifest)]
            line = reuse_refusal(f"{folder} with {counted(shards, 'shard')}", folder_size(folder), changes)
            log.warning("%s: %s", folders.published.name, line)
    numbers = {name: number for number, name in enumerate(data.shards, start=1)}
    for report in reports:
        facts = numbers[report["name"]], len(numbers), report["action"], report["rows"]
        log.info("%s: shard %d of %d %s (%d rows)", folders.published.name, *facts)


def _wait_until_visible(path: Path) -> None:
    """Wait for a path that another machine wrote."""
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path}, written by another machine, is not visible here: put the data on a file system that all "
                "machines share, or set launch.machines=1"
            )
        time.sleep(0.1)
