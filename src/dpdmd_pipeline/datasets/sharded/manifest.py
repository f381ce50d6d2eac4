"""The manifest of a cache, and the checks of a cache against it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.sharded.shard import read_header, shard_path
from dpdmd_pipeline.publishing import write_atomically

VERSION = 1
MANIFEST = "manifest.json"


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


def cache_identity(content: str, names: Sequence[str]) -> str:
    """Identity that every shard of a cache carries.

    Args:
        content: fingerprint of everything that decides the content.
        names: of the shards, in order.
    """
    return fingerprint(VERSION, content, list(names))


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Write a record with fingerprint, shards (name, rows, bytes, sha256), tensors (dtype, row shape) and manifest."""
    text = json.dumps({"version": VERSION, **record}, indent=1)
    write_atomically(folder / MANIFEST, lambda temporary: temporary.write_text(text))


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Read the manifest of a cache; None if it is missing or unreadable.

    Raises:
        ValueError: if another version of this format wrote it.
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
            f"delete {folder} to make it again, or use the program that wrote it"
        )
    return record


def find_damage(folder: Path, record: dict[str, Any]) -> str | None:
    """Describe the first difference between a cache and its manifest, by headers and sizes; None if it is whole."""
    identity = cache_identity(record["fingerprint"], [shard["name"] for shard in record["shards"]])
    for shard in record["shards"]:
        path = shard_path(folder, shard["name"])
        if not path.exists():
            return f"{path} is missing, expected {shard['bytes']} bytes"
        if (size := path.stat().st_size) != shard["bytes"]:
            return f"{path} has {size} bytes, expected {shard['bytes']}"
        header = read_header(path)
        if header is None or header.rows != shard["rows"] or header.tensors != record["tensors"]:
            return f"{path} has the expected {size} bytes, but its content differs from the manifest"
        if header.cache != identity:
            return f"{path} belongs to another cache than its manifest"
    return None


def repair_hint(folder: Path) -> str:
    return f"run the stage that writes it again (whole shards are kept), or delete {folder} and run again"
