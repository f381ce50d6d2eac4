"""A cache of tensors larger than memory: a folder of safetensors shards and a manifest.

    anchors/                     the published cache: whole, or found out by `load`
        00000.safetensors ...    rows, one shard after the other in the manifest's order
        manifest.json            {version, fingerprint, shards, tensors, manifest}
    .anchors.partial/            the cache in the making; its manifest comes last
    .anchors.ready/              the same, whole, for the moment of publishing
    .anchors.old/                the cache it replaces, while it is deleted
    .anchors.lock                held by the process that writes

Every shard carries the identity of its cache in its header, so a shard proves by itself that it is
whole and belongs here; nothing else has to be remembered for resuming after a kill.

Many processes share the missing shards, a round of one each at a time. What they leave is what one leaves, at every
moment: another number of processes goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import operator
import os
import shutil
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Protocol

from kedro.io import AbstractDataset
from safetensors import SafetensorError, safe_open

from dpdmd_pipeline.publishing import (
    Folders,
    load_published,
    locked,
    publish,
    recover,
    sha256,
    write_atomically,
    writing,
)

log = logging.getLogger(__name__)

VERSION = 1
MANIFEST = "manifest.json"
_VISIBLE_WITHIN = 60  # seconds; a shared file system may show late what another machine has written
Tensors = dict[str, Any]  # of torch.Tensor; spelt so because loading a catalog must not load torch

# Names of safetensors' header -> names of torch.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


class Member(Protocol):
    """One of many processes that write a cache, as `training.launch` has them."""

    rank: int
    size: int

    def end_at_once(self) -> None: ...

    def gather(self, value: Any) -> list[Any]: ...

    def report(self, record: dict[str, Any]) -> None: ...


# (work, job that can be pickled) -> what rank 0 reports, while every process does work(job, member)
Launched = Callable[[Callable[[Any, Member], bool], Any], Iterator[dict[str, Any]]]


@dataclass(frozen=True)
class LazyShards:
    """What a node returns: shards that are computed when, and only if, they must be written.

    Attributes:
        shards: name -> thunk, in the order of the rows. A thunk returns tensors [rows, ...] with the
            same number of rows, the same names, dtypes and row shapes in every shard. Thunks are
            called one at a time, and not at all for shards that are already there.
        fingerprint: of everything that decides the content.
        manifest: JSON-able facts, stored beside the shards.
        launched: starts the processes that share the shards, whose thunks can be pickled then; None for this one.
    """

    shards: Mapping[str, Callable[[], Tensors]]
    fingerprint: str
    manifest: dict[str, Any]
    launched: Launched | None = None


class Held:
    """Loads on use and holds the last: what the thunks of one process share.

    Args:
        load: can be pickled; what it has loaded stays with its process.
    """

    def __init__(self, load: Callable[..., Any]) -> None:
        self._load, self._key, self._value = load, None, None

    def __call__(self, *key: Any) -> Any:
        if self._key != key:
            self._key = self._value = None  # one goes before the next comes
            self._value, self._key = self._load(*key), key
        return self._value

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_key": None, "_value": None}


def fingerprint(*parts: Any) -> str:
    """SHA-256 of the parts' JSON, hexadecimal; the same on every machine and in every order of keys.

    Raises:
        ValueError: if a part is not JSON (a path, a tensor, NaN).
    """
    try:
        text = json.dumps(parts, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"cannot fingerprint {parts!r:.200}: {error}; give JSON-able parts") from error
    return hashlib.sha256(text.encode()).hexdigest()


# ---- one shard ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shard:
    """What the header of a whole shard says."""

    cache: str  # identity of the cache it belongs to
    rows: int
    bytes: int
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape of a row


def _read_header(path: Path) -> _Shard | None:
    """The header of a shard; None if it is missing, cut off, or no shard of ours."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > size - 8:
                return None
            header = json.loads(file.read(length))
        cache = header.pop("__metadata__")["cache"]
        if size != 8 + length + max(entry["data_offsets"][1] for entry in header.values()):
            return None
        tensors = {
            name: {"dtype": _DTYPES[entry["dtype"]], "shape": entry["shape"][1:]}
            for name, entry in sorted(header.items())
        }
        (rows,) = {entry["shape"][0] for entry in header.values()}
    except (FileNotFoundError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None
    return _Shard(cache, rows, size, tensors)


def _write_shard(path: Path, tensors: Tensors, identity: str) -> None:
    """Write one shard, durably.

    Raises:
        ValueError: if the tensors do not have one number of rows, or a dtype is not safetensors'.
        OSError: naming the path, if it cannot be written.
    """
    from safetensors.torch import save_file

    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if not shapes or [] in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"shard {path.stem} needs tensors with one number of rows, it has shapes {shapes}")
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in own.items():
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES.values():
            raise ValueError(f"tensor {name} of shard {path.stem} has dtype {tensor.dtype}, which cannot be stored")
    # safetensors refuses tensors that share memory, as the levels of one stacked rollout do
    memory = Counter(tensor.untyped_storage().data_ptr() for tensor in own.values())
    own = {name: t.clone() if memory[t.untyped_storage().data_ptr()] > 1 else t for name, t in own.items()}
    write_atomically(path, lambda temporary: save_file(own, temporary, {"cache": identity}))


# ---- a cache ------------------------------------------------------------------------------------


def _identity(shards: LazyShards) -> str:
    return fingerprint(VERSION, shards.fingerprint, list(shards.shards))


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a cache; None if it is missing or unreadable.

    Raises:
        ValueError: if it was written by another version of this format.
    """
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_bytes())
        version = record["version"]
        if version == VERSION and not {"fingerprint", "shards", "tensors", "manifest"} <= record.keys():
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}, this program reads version {VERSION}: "
            f"delete {folder} to have it made again, or use the program that wrote it"
        )
    return record


def _damage(folder: Path, record: dict[str, Any]) -> str | None:
    """The first thing wrong with a cache, with names and numbers; None if it is whole."""
    identity = fingerprint(VERSION, record["fingerprint"], [shard["name"] for shard in record["shards"]])
    for shard in record["shards"]:
        path = folder / f"{shard['name']}.safetensors"
        if not path.exists():
            return f"{path} is missing, expected {shard['bytes']} bytes"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path} has {size} bytes, expected {shard['bytes']}"
        header = _read_header(path)
        if header is None or header.rows != shard["rows"] or header.tensors != record["tensors"]:
            return f"{path} has {size} bytes as expected, but another content than its manifest says"
        if header.cache != identity:
            return f"{path} belongs to another cache than its manifest"
    return None


def _remedy(folder: Path) -> str:
    return f"run the stage that writes it again (whole shards are kept), or delete {folder} and run again"


class ShardedTensors:
    """A cache on disk: rows by random access, or shard after shard.

    Attributes:
        manifest: the facts that were stored beside the shards.
        fingerprint: of everything that decided the content.
        tensors: name -> {"dtype": name of torch, "shape": of a row}.
    """

    def __init__(self, folder: Path, record: dict[str, Any]) -> None:
        self.manifest: dict[str, Any] = record["manifest"]
        self.fingerprint: str = record["fingerprint"]
        self.tensors: dict[str, dict[str, Any]] = record["tensors"]
        self._folder = folder
        self._names = [shard["name"] for shard in record["shards"]]
        self._ends = list(accumulate(shard["rows"] for shard in record["shards"]))
        self._identity = fingerprint(VERSION, self.fingerprint, self._names)
        self._mapped: dict[int, Tensors] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_mapped": {}}  # mapped files stay with their process

    def rows(self, indices: Sequence[int]) -> Tensors:
        """The rows at `indices`, in that order, duplicates included; nothing else is read.

        Args:
            indices: 0 <= index < len(self).

        Returns:
            Name -> tensor [len(indices), ...], as stored.

        Raises:
            IndexError: if an index is negative or beyond the last row.
            ValueError: if the cache on disk was replaced since it was loaded.
        """
        import torch

        places = [self._place_of(operator.index(index)) for index in indices]
        if not places:
            return {
                name: torch.empty([0, *spec["shape"]], dtype=getattr(torch, spec["dtype"]))
                for name, spec in self.tensors.items()
            }
        for shard in {shard for shard, _ in places}.difference(self._mapped):
            self._mapped[shard] = self._map(shard)
        return {name: torch.stack([self._mapped[shard][name][row] for shard, row in places]) for name in self.tensors}

    def shards(self) -> Iterator[Tensors]:
        """Shard after shard, each name -> tensor [rows, ...]; one in memory at a time."""
        for shard in range(len(self._names)):
            yield self._map(shard)  # not from `_mapped`: the caller may write into these

    def _place_of(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self._folder}, which has {len(self)} rows, counted from 0")
        shard = bisect_right(self._ends, index)
        return shard, index - (self._ends[shard - 1] if shard else 0)

    def _map(self, shard: int) -> Tensors:
        """The tensors of a shard, mapped into memory: the system reads a page when it is touched."""
        path = self._folder / f"{self._names[shard]}.safetensors"
        try:
            file = safe_open(path, framework="pt")
        except (FileNotFoundError, SafetensorError) as error:
            raise ValueError(f"{path} was damaged since it was loaded ({error}): {_remedy(self._folder)}") from error
        if (file.metadata() or {}).get("cache") != self._identity:
            raise ValueError(f"{path} was replaced by another cache since it was loaded: run again")
        return {name: file.get_tensor(name) for name in self.tensors}


class ShardedDataset(AbstractDataset[LazyShards, ShardedTensors]):
    """Tensors larger than memory: saved shard by shard, resumable, published whole.

    Args:
        filepath: the folder of the cache.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, filepath: str, metadata: dict[str, Any] | None = None) -> None:
        self._filepath = Path(filepath)
        self.metadata = metadata

    def load(self) -> ShardedTensors:
        """Check the manifest and every shard's header and size, and read nothing else.

        Raises:
            FileNotFoundError: if there is no cache.
            ValueError: if it is damaged, or of another version of the format.
        """
        folders = Folders.of(self._filepath)
        folder = load_published(folders)
        if folder is None:
            raise FileNotFoundError(f"{folders.published} does not exist: run the stage that writes it first")
        record = _read_manifest(folder)
        damage = f"{folder / MANIFEST} is missing or unreadable" if record is None else _damage(folder, record)
        if damage:
            raise ValueError(f"{damage}: {_remedy(folder)}")
        return ShardedTensors(folder, record)

    def save(self, data: LazyShards) -> None:
        """Write what is missing and publish; a whole cache of the same fingerprint is left as it is.

        Raises:
            ValueError: if shards disagree in names, dtypes or shapes, if another process is writing,
                or if the folder holds something that is not a cache.
            OSError: naming the path, if it cannot be written; finished shards are kept.
        """
        _check(data)
        folders = Folders.of(self._filepath)
        if data.launched is not None and data.shards:
            _save_launched(data, folders)
            return
        with locked(folders):
            recover(folders)
            if not _is_published(data, folders.published):
                _prepare(data, folders)
                _write_all(data, folders)
                publish(folders)

    def _exists(self) -> bool:
        folders = Folders.of(self._filepath)
        return (folders.published / MANIFEST).is_file() or folders.ready.exists()

    def _describe(self) -> dict[str, Any]:
        return {"filepath": str(self._filepath)}


def _check(data: LazyShards) -> None:
    """Find before the first shard what would otherwise show after the last."""
    if not isinstance(data, LazyShards):
        raise ValueError(f"a sharded dataset saves LazyShards, it was given {type(data).__name__}")
    for name in data.shards:
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"shard name {name!r} must be a plain file name: not empty, no slash, no leading dot")
    fingerprint(data.manifest)


def _is_published(data: LazyShards, folder: Path) -> bool:
    """Whether the published cache is this one, and whole; says in the log if it is, or is damaged.

    Raises:
        ValueError: if the folder is of another version, or no cache at all (it would be deleted).
    """
    if not folder.exists():
        return False
    record = _read_manifest(folder)
    if record is None:
        foreign = [path.name for path in folder.iterdir() if not path.name.endswith((".safetensors", ".tmp", MANIFEST))]
        if foreign:
            raise ValueError(f"{folder} is not a cache (no {MANIFEST}, but {foreign[0]!r}): move it away and run again")
        log.warning("%s: %s is missing or unreadable, repairing", folder.name, MANIFEST)
        return False
    if record["fingerprint"] != data.fingerprint or [shard["name"] for shard in record["shards"]] != list(data.shards):
        return False
    if damage := _damage(folder, record):
        log.warning("%s: %s; repairing", folder.name, damage)
    else:
        log.info("%s: reused (%d shards)", folder.name, len(data.shards))
    return damage is None


def _prepare(data: LazyShards, folders: Folders) -> None:
    """Leave in the partial folder exactly those shards that are whole and of this cache."""
    identity = _identity(data)
    names = {f"{name}.safetensors" for name in data.shards}

    def is_kept(path: Path) -> bool:
        header = _read_header(path) if path.name in names else None
        return header is not None and header.cache == identity

    with writing(folders.partial):
        folders.partial.mkdir(parents=True, exist_ok=True)
        for path in folders.partial.iterdir():
            if not is_kept(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        if not folders.published.exists():
            return
        # A damaged cache gives its whole shards; those of another cache do not pass for this one.
        record = _read_manifest(folders.published) or {"shards": []}
        hashes = {f"{shard['name']}.safetensors": shard["sha256"] for shard in record["shards"]}
        for path in sorted(folders.published.iterdir()):
            if is_kept(path) and hashes.get(path.name) in (None, sha256(path)):
                os.replace(path, folders.partial / path.name)


def _write_all(data: LazyShards, folders: Folders) -> None:
    """Call the thunks of the missing shards, one at a time, and lay the manifest last."""
    finished, identity = _Finished(data, folders), _identity(data)
    for name in data.shards:
        record = _finish_shard(data, folders, identity, name)
        finished.add(record)
        _log(folders, finished.told(record))
    finished.lay_manifest()


def _finish_shard(data: LazyShards, folders: Folders, identity: str, name: str) -> dict[str, Any]:
    """Write a shard, unless it is there; returns what the manifest says of it, its tensors, and which of the two."""
    path = folders.partial / f"{name}.safetensors"
    verb = "kept" if path.exists() else "written"
    if verb == "written":
        _write_shard(path, data.shards[name](), identity)
    header = _read_header(path)
    shard = {"name": name, "rows": header.rows, "bytes": header.bytes, "sha256": sha256(path)}
    return {"shard": shard, "tensors": header.tensors, "verb": verb}


class _Finished:
    """The shards of a cache in the making, as they are finished."""

    def __init__(self, data: LazyShards, folders: Folders) -> None:
        self._data, self._folders = data, folders
        self._numbers = {name: number for number, name in enumerate(data.shards, start=1)}
        self._shards: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, Any] = {}

    def add(self, record: dict[str, Any]) -> None:
        """Take a record of `_finish_shard`.

        Raises:
            ValueError: if the shard's tensors are not those of the others.
        """
        name, tensors = record["shard"]["name"], record["tensors"]
        self._tensors = self._tensors or tensors
        if tensors != self._tensors:
            (self._folders.partial / f"{name}.safetensors").unlink()
            cache = self._folders.published.name
            raise ValueError(f"shard {name} of {cache} has tensors {tensors}, shards before it {self._tensors}")
        self._shards[name] = record["shard"]

    def told(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the log says of it."""
        number, rows = self._numbers[record["shard"]["name"]], record["shard"]["rows"]
        return {"number": number, "of": len(self._numbers), "verb": record["verb"], "rows": rows}

    def lay_manifest(self) -> None:
        shards = [self._shards[name] for name in self._data.shards]
        facts = {"version": VERSION, "fingerprint": self._data.fingerprint, "shards": shards, "tensors": self._tensors}
        text = json.dumps(facts | {"manifest": self._data.manifest}, indent=1)
        write_atomically(self._folders.partial / MANIFEST, lambda temporary: temporary.write_text(text))


def _log(folders: Folders, told: dict[str, Any]) -> None:
    log.info("%s: shard %d of %d %s (%d rows)", folders.published.name, *told.values())


# ---- the same in many processes


def _save_launched(data: LazyShards, folders: Folders) -> None:
    """Start the processes and tell what they finish; the first of them, on whichever machine, holds the lock."""
    if _is_published(data, folders.published):
        return
    with closing(data.launched(_write_share, (replace(data, launched=None), folders))) as records:
        for told in records:
            _log(folders, told)


def _write_share(job: tuple[LazyShards, Folders], member: Member) -> bool:
    """What each process does; returns True, when the cache is published."""
    data, folders = job
    member.end_at_once()  # a shard is there whole or not at all
    with locked(folders) if member.rank == 0 else nullcontext():
        (names, *_) = member.gather(_begin(data, folders) if member.rank == 0 else None)
        _wait_until_seen(folders.partial)
        finished, identity = _Finished(data, folders), _identity(data)
        for start in range(0, len(names), member.size):  # by rounds, so that the end of one is soon noticed by all
            mine = names[start + member.rank : start + member.size][:1]
            records = list(chain(*member.gather([_finish_shard(data, folders, identity, name) for name in mine])))
            if member.rank == 0:
                _take(records, finished, folders, member)
        if member.rank == 0:
            finished.lay_manifest()
            publish(folders)
    return True


def _begin(data: LazyShards, folders: Folders) -> list[str]:
    """Make the partial folder; returns the names of the shards that are there, then of the missing ones."""
    recover(folders)
    _prepare(data, folders)
    return sorted(data.shards, key=lambda name: not (folders.partial / f"{name}.safetensors").exists())


def _take(records: list[dict[str, Any]], finished: _Finished, folders: Folders, member: Member) -> None:
    """A round's shards, as the first process sees them."""
    for record in records:
        path = folders.partial / f"{record['shard']['name']}.safetensors"
        _wait_until_seen(path)
        finished.add(record)
        member.report(finished.told(record))


def _wait_until_seen(path: Path) -> None:
    """Wait for what another machine has written.

    Raises:
        OSError: if it does not show.
    """
    until = time.monotonic() + _VISIBLE_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            raise OSError(
                f"{path}, written by another machine, is not seen here: put the data on a file system that all "
                "machines share, or set launch.machines=1"
            )
        time.sleep(0.1)
