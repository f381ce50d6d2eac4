"""The tensors of a student's file: reading them, and checking their keys. torch and safetensors only."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from .limits import MAX_DEPTH, check_limit, shorten

FOLDERS = ("diffusion_models", "loras")
# Prefixes that trainers and savers put in front of every key
_WRAPPERS = ("model.diffusion_model.", "module.", "student.", "transformer.", "unet.")
_SAFETENSORS = (".safetensors", ".sft")


def folder_and_file(student_name: str) -> tuple[str, str]:
    """Split an entry of the node's list, such as `diffusion_models/sd35.safetensors`.

    Raises:
        ValueError: if it is not inside one of the two folders of ComfyUI's models.
    """
    folder, _, file = student_name.replace("\\", "/").partition("/")
    path = PurePosixPath(file)
    if folder not in FOLDERS or not path.parts or path.is_absolute() or ".." in path.parts or ":" in file:
        raise ValueError(
            f"student_name {shorten(student_name)!r} is not inside models/{FOLDERS[0]} or models/{FOLDERS[1]}: "
            "put the file there, refresh, and choose it from the list"
        )
    return folder, file


def load_state(
    path: str, name: str, read: Callable[[str], dict[str, Tensor]] = load_file
) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    """All tensors of a file on the CPU, and its metadata (None for a pickle). Never run code in a pickle.

    Args:
        path: of the file.
        name: of the file, for messages.
        read: reads the tensors of a safetensors file. ComfyUI's reader follows its options for memory.

    Raises:
        OSError: if the file is damaged or incomplete.
        ValueError: if it holds anything but weights.
        LimitError: if its dicts are too deep in each other, or one contains itself, or it unpacks to more bytes than
            it has.
    """
    if not _is_safetensors(path):
        return _load_pickle(path, name), None
    metadata = read_metadata(path, name)  # refuses a damaged file before `read`, whose errors differ by version
    state = read(path)
    if not state:
        raise ValueError(f"{name} holds no tensors: export it again")
    return state, metadata


def read_metadata(path: str, name: str) -> dict[str, str] | None:
    """Metadata of a safetensors file, without reading a tensor; None if the file is of another kind.

    Raises:
        OSError: if the file is damaged or incomplete.
    """
    if not _is_safetensors(path):
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata()
    except SafetensorError as error:
        raise OSError(
            f"{name} is not a complete safetensors file ({first_line(error)}): download or export it again"
        ) from None


def looks_like_student(path: str | None) -> bool:
    """True if a DP-DMD header begins in the first 64 KiB of a file: cheap enough for every file that a user owns."""
    if path is None:
        return False
    try:
        status = Path(path).stat()
        return _begins_like_student(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return False


@lru_cache(maxsize=10_000)
def _begins_like_student(path: str, _modified: int, _size: int) -> bool:
    with Path(path).open("rb") as file:
        return b'"dpdmd.format"' in file.read(2**16)


def _is_safetensors(path: str) -> bool:
    return path.lower().endswith(_SAFETENSORS)


def _load_pickle(path: str, name: str) -> dict[str, Tensor]:
    _check_unpacked(path, name)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} holds more than weights (code, or a whole model object), or is no torch file; it was not run: "
            "save its state_dict as .safetensors"
        ) from None
    except Exception as error:  # torch raises many types for bytes that are no pickle
        raise OSError(f"{name} is not a complete torch file ({first_line(error)}): download it again") from None
    return _innermost(state, name)


def _check_unpacked(path: str, name: str) -> None:
    """Refuse an archive with compressed entries, which can fill the memory; torch itself writes none."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
    except (OSError, ValueError, zipfile.BadZipFile):
        return  # an older torch file, or a damaged one: torch.load finds out
    check_limit(name, size, "bytes unpacked", Path(path).stat().st_size)


def _innermost(state: Any, name: str) -> dict[str, Tensor]:
    """The state dict inside {"state_dict": ...} or any other dict with one entry."""
    depth = 1
    while isinstance(state, dict) and ("state_dict" in state or len(state) == 1):
        inner = state.get("state_dict", next(iter(state.values())))
        if not isinstance(inner, dict):
            break
        state, depth = inner, depth + 1
        check_limit(name, depth, "dicts in each other", MAX_DEPTH)
    if not isinstance(state, dict) or not state:
        raise ValueError(f"{name} holds a {type(state).__name__}, not a state dict: save the network's state_dict")
    strange = {
        key if isinstance(key, str) else f"a key of type {type(key).__name__}"
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    }
    if strange:
        raise ValueError(
            f"{name} holds more than tensors ({first_three(sorted(strange))}): save the network's state_dict alone"
        )
    return state


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with the network's own keys: prefixes that every key shares are removed, up to MAX_DEPTH of them."""
    for _ in range(MAX_DEPTH):
        wrapper = next((prefix for prefix in _WRAPPERS if all(key.startswith(prefix) for key in state)), "")
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return dict(state)


def check_keys(keys: Iterable[str], expected: Iterable[str], name: str) -> None:
    """Refuse a student that does not fill its network exactly.

    Raises:
        ValueError: with the first three surplus or missing keys.
    """
    keys, expected = set(keys), set(expected)
    if surplus := sorted(keys - expected):
        raise ValueError(
            f"{name} has {len(surplus)} keys that the network lacks ({first_three(surplus)}): export it again"
        )
    if missing := sorted(expected - keys):
        raise ValueError(
            f"{name} lacks {len(missing)} of {len(expected)} keys ({first_three(missing)}): export it again"
        )


def first_three(names: list[str]) -> str:
    """The first three of many names, for a message."""
    return ", ".join(shorten(name) for name in names[:3]) + (", ..." if len(names) > 3 else "")


def first_line(error: Exception) -> str:
    """An error's message without its list of details."""
    return shorten(str(error).strip().split("\n")[0])
