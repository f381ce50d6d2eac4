"""Safetensors files: read and write tensors with their metadata; refuse pickles and incomplete files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpdmd_pipeline.wording import listed

FEW = 3  # names in an error message
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of finite weights: the same content gives the same bytes on every machine."""
    check_finite(path, weights)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata=dict(metadata))
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file: the library's order differs from process to process."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the sorted header has {len(text)} bytes, {length} are reserved")
        file.seek(8)
        file.write(text.ljust(length))  # the format allows spaces at the end


def load_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; {} if it has none."""
    with open_tensors(path) as file:
        return file.metadata() or {}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Load all tensors of a safetensors file to the CPU."""
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
        raise ValueError(f"{path}: weights are not finite ({listed(names, FEW)}): train again, or choose a wider dtype")
