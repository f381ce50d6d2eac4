"""Safetensors files: read and write tensors with their metadata; refuse pickles, incomplete and damaged files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpdmd_pipeline.limits import first_names

CHECKSUM = "sha256"  # key in the metadata: SHA-256 of the file, taken with zeros in its own place
_BLANK = "0" * 64
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of finite weights, with a checksum: equal contents give equal bytes everywhere."""
    check_finite(path, weights)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={**metadata, CHECKSUM: _BLANK})
    _finish_header(path, tensors)


def _finish_header(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Sort the metadata, whose order differs from process to process, and set the checksum; reads the header only."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the sorted header has {len(text)} bytes, {length} are reserved")
        text = text.ljust(length)  # the format allows spaces at the end
        digest = hashlib.sha256(length.to_bytes(8, "little") + text)
        del header["__metadata__"]
        for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
            digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy())
        file.seek(8)
        file.write(text.replace(_BLANK.encode(), digest.hexdigest().encode(), 1))


def check_content(path: Path) -> None:
    """Hold a file against the checksum in its metadata; a file without one is taken as it is.

    Each process reads a file once, unless it changes. An OSError if it is damaged.
    """
    status = path.stat()
    if not _is_intact(path, status.st_ino, status.st_size, status.st_mtime_ns):
        raise OSError(f"{path} does not match its checksum, it is damaged or changed: copy it or make it again")


@cache
def _is_intact(path: Path, *_: int) -> bool:
    checksum = load_metadata(path).get(CHECKSUM)
    return checksum is None or (len(checksum) == len(_BLANK) and _sha256(path, checksum) == checksum)


def _sha256(path: Path, checksum: str) -> str:
    """SHA-256 of a safetensors file with zeros in the place of its checksum, hexadecimal."""
    with path.open("rb") as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, "little")).replace(checksum.encode(), _BLANK.encode())
        return hashlib.file_digest(file, lambda: hashlib.sha256(length + header)).hexdigest()


def load_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; {} if it has none."""
    with open_tensors(path) as file:
        return file.metadata() or {}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a safetensors file, which must be intact, to the CPU."""
    check_content(path)
    with open_tensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def stored_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Read names and shapes of the tensors in safetensors files, without their contents."""
    shapes = {}
    for path in paths:
        with open_tensors(path) as file:
            shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: if it is a pickle.
        OSError: if it is missing or incomplete.
    """
    refuse_pickles([path])
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{path} is not a complete safetensors file ({error}): make or copy it again") from error
    with file:
        yield file


def refuse_pickles(paths: Iterable[Path]) -> None:
    """Raise ValueError if a file is a pickle; none is opened."""
    for path in paths:
        if path.suffix in _PICKLES:
            raise ValueError(
                f"{path} is a pickle, which can run any program when it is opened: give a .safetensors file "
                "(torch.load(..., weights_only=True), then safetensors.torch.save_file)"
            )


def check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError if a tensor that is read from `path`, or written to it, is not finite."""
    if names := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{path}: weights are not finite ({first_names(names)}): train again, or choose a wider dtype")
