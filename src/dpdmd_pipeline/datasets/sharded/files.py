"""Files of a cache: shards, whose headers carry the identity of their cache, and the manifest that lists them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from dpdmd_pipeline.publishing import sha256, write_atomically

VERSION = 1
MANIFEST = "manifest.json"

Tensors = dict[str, Any]  # of torch.Tensor; Any because loading a catalog must not load torch

# Names of safetensors' header -> names of torch.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


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


def cache_identity(content: str, names: list[str]) -> str:
    """Identity that every shard of a cache carries, from the content's fingerprint and the shards' names in order."""
    return fingerprint(VERSION, content, names)


# ---- shards


class ShardHeader(NamedTuple):
    """The header of a complete shard."""

    cache: str  # identity of the cache
    rows: int
    bytes: int  # of the file
    tensors: dict[str, dict[str, Any]]  # name -> dtype, shape of a row


def shard_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.safetensors"


def read_header(path: Path) -> ShardHeader | None:
    """Read the header of a shard; None if the file is missing, truncated or not a shard."""
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in sorted(file.keys())}
            cache = file.metadata()["cache"]
        (rows,) = {tensor.get_shape()[0] for tensor in slices.values()}
        tensors = {
            name: {"dtype": _DTYPES[tensor.get_dtype()], "shape": tensor.get_shape()[1:]}
            for name, tensor in slices.items()
        }
    except (OSError, SafetensorError, ValueError, KeyError, IndexError, TypeError):
        return None
    return ShardHeader(cache, rows, path.stat().st_size, tensors)


def write_shard(path: Path, tensors: Tensors, cache: str) -> None:
    """Write tensors [rows, ...] as a shard of the cache with the identity `cache`."""
    from safetensors.torch import save_file

    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if not shapes or [] in shapes.values() or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"shard {path.stem} needs tensors with one number of rows, it has shapes {shapes}")
    for name, tensor in tensors.items():
        if str(tensor.dtype).removeprefix("torch.") not in _DTYPES.values():
            raise ValueError(f"tensor {name} of shard {path.stem} has dtype {tensor.dtype}, which cannot be stored")
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # safetensors refuses tensors that share memory, such as the levels of one stacked rollout
    users = Counter(tensor.untyped_storage().data_ptr() for tensor in stored.values())
    stored = {name: t.clone() if users[t.untyped_storage().data_ptr()] > 1 else t for name, t in stored.items()}
    write_atomically(path, lambda temporary: save_file(stored, temporary, {"cache": cache}))


# ---- the manifest


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Write a record with fingerprint, shards (name, rows, bytes, sha256), tensors (dtype, row shape) and manifest.

    Shards of several shapes also have their own tensors; those of the record are the first one's.
    """
    text = json.dumps({"version": VERSION, **record}, indent=1)
    write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(text))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a cache; None if it is missing or unreadable."""
    path = folder / MANIFEST
    try:
        record = json.loads(path.read_bytes())
        version = record["version"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    if version != VERSION:
        raise ValueError(
            f"{path} has version {version!r}, this program reads version {VERSION}: "
            f"delete {folder} to make it again, or use the program that wrote it"
        )
    return record if {"fingerprint", "shards", "tensors", "manifest"} <= record.keys() else None


def find_damage(folder: Path, record: dict[str, Any], *, rows: bool = False) -> str | None:
    """Describe the first difference between a cache and its manifest; None if it is whole.

    Compares headers and sizes, and with `rows` also checksums, which reads all shards.
    """
    identity = cache_identity(record["fingerprint"], [shard["name"] for shard in record["shards"]])
    for shard in record["shards"]:
        path = shard_path(folder, shard["name"])
        if not path.exists():
            return f"{path} is missing, expected {shard['bytes']} bytes"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path} has {size} bytes, expected {shard['bytes']}"
        header = read_header(path)
        tensors = shard.get("tensors", record["tensors"])
        if header is None or header.rows != shard["rows"] or header.tensors != tensors:
            return f"{path} has the expected {size} bytes, but its content differs from the manifest"
        if header.cache != identity:
            return f"{path} belongs to another cache than its manifest"
        if rows and not is_intact(path, shard):
            return f"{path} does not have the SHA-256 of its manifest"
    return None


def is_intact(path: Path, entry: dict[str, Any]) -> bool:
    """True if a shard has the checksum of its entry in the manifest, or the entry has none.

    Each process reads a file once, unless it changes.
    """
    if "sha256" not in entry:
        return True
    status = path.stat()
    return entry["sha256"] == _sha256(path, status.st_ino, status.st_size, status.st_mtime_ns)


@cache
def _sha256(path: Path, *_: int) -> str:
    return sha256(path)


def repair_hint(folder: Path) -> str:
    return f"run the stage that writes it again (whole shards are kept), or delete {folder} and run again"
