"""Write a cache: reuse complete shards, compute the missing ones, publish the whole.

Several processes share the missing shards, one shard each per round. At every moment they leave the same files as one
process would, so any number of processes can resume.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.datasets.sharded.lazy import LazyShards, Member, check_lazy_shards
from dpdmd_pipeline.datasets.sharded.manifest import (
    MANIFEST,
    cache_identity,
    find_damage,
    read_manifest,
    write_manifest,
)
from dpdmd_pipeline.datasets.sharded.shard import read_header, shard_path, write_shard
from dpdmd_pipeline.publishing import Folders, locked, publish, recover, sha256, writing

log = logging.getLogger(__name__)

_VISIBLE_WITHIN = 60  # seconds; a shared file system may show late what another machine wrote


def write_cache(data: LazyShards, folders: Folders) -> None:
    """Write the missing shards and publish; a whole cache of the same fingerprint stays as it is.

    Raises:
        ValueError: if shards disagree in names, dtypes or shapes, if another process is writing,
            or if the folder holds something that is not a cache.
        OSError: if the cache cannot be written; names the path. Finished shards are kept.
    """
    check_lazy_shards(data)
    if data.launch is not None and data.shards:
        if not _is_published(data, folders.published):
            with closing(data.launch(_write_share, (replace(data, launch=None), folders))) as reports:
                _log_shards(data, folders, reports)
        return
    with locked(folders):
        recover(folders)
        if not _is_published(data, folders.published):
            _log_shards(data, folders, _write_missing(data, folders, _Alone()))


def _write_share(job: tuple[LazyShards, Folders], member: Member) -> bool:
    """Do the work of one of many processes; returns True. Rank 0, on whichever machine, holds the lock."""
    data, folders = job
    member.end_at_once()  # safe at any moment: a shard is complete or absent
    with locked(folders) if member.rank == 0 else nullcontext():
        if member.rank == 0:
            recover(folders)
        for report in _write_missing(data, folders, member):
            member.report(report)
    return True


class _Alone:
    """The only process that writes a cache."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class _Finished(NamedTuple):
    """A shard on the disk."""

    entry: dict[str, Any]  # in the manifest
    tensors: dict[str, Any]  # name -> dtype, shape of a row
    action: str  # "kept" or "written"


def _write_missing(data: LazyShards, folders: Folders, member: Member | _Alone) -> Iterator[dict[str, Any]]:
    """Share the shards in rounds, so that all processes soon notice the end of one.

    Rank 0 publishes, and yields a report of each finished shard.
    """
    identity = cache_identity(data.fingerprint, list(data.shards))
    names, *_ = member.gather(_reuse_shards(data, folders, identity) if member.rank == 0 else None)
    _wait_until_visible(folders.partial)
    finished: dict[str, _Finished] = {}
    for start in range(0, len(names), member.size):
        own_names = names[start + member.rank : start + member.size][:1]
        shards = chain(*member.gather([_finish_shard(data, folders, identity, name) for name in own_names]))
        for shard in shards if member.rank == 0 else []:
            name = shard.entry["name"]
            _wait_until_visible(shard_path(folders.partial, name))
            _check_tensors(shard, finished, folders)
            finished[name] = shard
            yield {"name": name, "action": shard.action, "rows": shard.entry["rows"]}
    if member.rank == 0:
        entries = [finished[name].entry for name in data.shards]
        tensors = next(iter(finished.values())).tensors if finished else {}
        record = {"fingerprint": data.fingerprint, "shards": entries, "tensors": tensors, "manifest": data.manifest}
        write_manifest(folders.partial, record)
        publish(folders)


def _is_published(data: LazyShards, folder: Path) -> bool:
    """True if the published cache is this one and whole; logs that it is reused, or its damage.

    Raises:
        ValueError: if another version wrote the folder, or it is no cache at all (it would be deleted).
    """
    if not folder.exists():
        return False
    record = read_manifest(folder)
    if record is None:
        foreign = [path.name for path in folder.iterdir() if not path.name.endswith((".safetensors", ".tmp", MANIFEST))]
        if foreign:
            raise ValueError(f"{folder} is not a cache (no {MANIFEST}, but {foreign[0]!r}): move it away and run again")
        log.warning("%s: %s is missing or unreadable, repairing", folder.name, MANIFEST)
        return False
    if record["fingerprint"] != data.fingerprint or [shard["name"] for shard in record["shards"]] != list(data.shards):
        return False
    if damage := find_damage(folder, record):
        log.warning("%s: %s; repairing", folder.name, damage)
    else:
        log.info("%s: reused (%d shards)", folder.name, len(data.shards))
    return damage is None


def _reuse_shards(data: LazyShards, folders: Folders, identity: str) -> list[str]:
    """Leave exactly the complete shards of this cache in the partial folder.

    Returns:
        Names of the shards: the complete ones, then the missing ones.
    """
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
            hashes = {shard_path(folders.published, shard["name"]): shard["sha256"] for shard in record["shards"]}
            for path in sorted(folders.published.iterdir()):
                if is_reusable(path) and hashes.get(path) in (None, sha256(path)):
                    os.replace(path, folders.partial / path.name)
    return sorted(data.shards, key=lambda name: not shard_path(folders.partial, name).exists())


def _finish_shard(data: LazyShards, folders: Folders, identity: str, name: str) -> _Finished:
    """Compute and write a shard unless it exists."""
    path = shard_path(folders.partial, name)
    action = "kept" if path.exists() else "written"
    if action == "written":
        write_shard(path, data.shards[name](), identity)
    header = read_header(path)
    entry = {"name": name, "rows": header.rows, "bytes": header.bytes, "sha256": sha256(path)}
    return _Finished(entry, header.tensors, action)


def _check_tensors(shard: _Finished, finished: dict[str, _Finished], folders: Folders) -> None:
    """Refuse, and delete, a shard whose tensors differ from those of the shards before it.

    Raises:
        ValueError: if they do.
    """
    expected = next(iter(finished.values()), shard).tensors
    if shard.tensors != expected:
        name, cache = shard.entry["name"], folders.published.name
        shard_path(folders.partial, name).unlink()
        raise ValueError(f"shard {name} of {cache} has tensors {shard.tensors}, shards before it {expected}")


def _log_shards(data: LazyShards, folders: Folders, reports: Iterator[dict[str, Any]]) -> None:
    numbers = {name: number for number, name in enumerate(data.shards, start=1)}
    for report in reports:
        facts = numbers[report["name"]], len(numbers), report["action"], report["rows"]
        log.info("%s: shard %d of %d %s (%d rows)", folders.published.name, *facts)


def _wait_until_visible(path: Path) -> None:
    """Wait for a path that another machine wrote.

    Raises:
        OSError: if it does not appear in time.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            raise OSError(
                f"{path}, written by another machine, is not visible here: put the data on a file system that all "
                "machines share, or set launch.machines=1"
            )
        time.sleep(0.1)
