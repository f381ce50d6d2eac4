"""One shard: a safetensors file whose header carries the identity of its cache."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.publishing import write_atomically

Tensors = dict[str, Any]  # of torch.Tensor; Any because loading a catalog must not load torch

# Names of safetensors' header -> names of torch.
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip


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
    return ShardHeader(cache, rows, size, tensors)


def write_shard(path: Path, tensors: Tensors, cache: str) -> None:
    """Write one shard.

    Args:
        tensors: name -> tensor [rows, ...].
        cache: identity of the cache.

    Raises:
        ValueError: if the tensors differ in their number of rows, or safetensors cannot store a dtype.
        OSError: if the file cannot be written; names the path.
    """
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
