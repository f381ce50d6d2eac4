"""Weights on disk: required files, digests, damage, and the command that fetches them. Nothing is downloaded here."""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from dpdmd_pipeline.publishing import sha256
from dpdmd_pipeline.wording import one_line

_OLD_CHECKPOINT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled
_UNREADABLE = AttributeError, EOFError, LookupError, RuntimeError, TypeError, struct.error, pickle.UnpicklingError
_MAX_LENGTH = 200  # characters of another library's error


@dataclass(frozen=True)
class Weights:
    """Published weights. Methods take the folder of the files, since it need not lie below that of all weights."""

    folder: str  # name below the folder of all weights
    files: tuple[str | tuple[str, ...], ...]  # all are required; of a tuple inside, one is enough
    source: str  # name or address of the publication
    licence: str
    size_mb: int  # approximate
    fetch: str = ""  # shell command that fetches the files; `{folder}` stands for their folder
    stage: str = ""  # stage of this project that makes them, in place of a command

    def lack(self, folder: Path) -> str:
        """Message on missing files, with licence, size and remedy; empty if all are in the folder."""
        sizes = {name: (folder / name).stat().st_size for name in self._present(folder)}
        absent = [" or ".join(names) for names in self._alternatives() if not any(map(sizes.get, names))]
        if not absent:
            return ""
        needs = f"needs {self.source} ({self.licence}, about {self.size_mb} MB)"
        return f"{needs}: {', '.join(absent)} not in {folder}; {self.remedy(folder)}"

    def digest(self, folder: Path) -> str:
        """SHA-256 (hex) of the contents of the existing files and of the shards that an index names."""
        digest = hashlib.sha256()
        for name in sorted(self._present(folder)):
            state = (folder / name).stat()
            digest.update(f"{name}\0{_sha256(folder / name, state.st_size, state.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    def damage(self, folder: Path) -> str | None:
        """Message on the first damaged file, with the remedy; None if no damage shows."""
        for name in sorted(self._present(folder)):
            why = damage_of(folder / name)
            if why:
                return f"{folder / name} is damaged ({why}): delete it; {self.remedy(folder)}"
        return None

    def remedy(self, folder: Path) -> str:
        """Instruction that brings the files: a shell command, or the stage that makes them."""
        if self.stage:
            return f"run the stage {self.stage}, or restore the folder from git"
        return f"fetch with: {self.command(folder)}"

    def command(self, folder: Path) -> str:
        """Shell command that fetches the files; empty for files that a stage makes."""
        return self.fetch.format(folder=shlex.quote(str(folder)))

    def _alternatives(self) -> Iterator[tuple[str, ...]]:
        """The names of each file, of which one is enough."""
        return ((names,) if isinstance(names, str) else names for names in self.files)

    def _present(self, folder: Path) -> set[str]:
        present = {name for names in self._alternatives() for name in names if (folder / name).is_file()}
        for index in [name for name in present if name.endswith(".index.json")]:
            present |= {name for name in _shards(folder / index) if (folder / name).is_file()}
        return present


@cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """SHA-256 of a file in this state, so that several metrics and models read gigabytes once."""
    return sha256(file)


def _shards(index: Path) -> list[str]:
    """Files that an index names; none for a damaged index, whose own content changes the digest."""
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return []


def damage_of(file: Path) -> str | None:
    """Reason why a file is not of its kind, such as an unfinished download or a web page; None if no damage shows."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in {".pt", ".pth", ".bin"}:
            return _checkpoint_damage(file)
    except (ValueError, EOFError, RuntimeError, zlib.error, SafetensorError, zipfile.BadZipFile) as error:
        return one_line(error)
    return None


def _checkpoint_damage(file: Path) -> str | None:
    """Damage of a file of torch.save or torch.jit.save: a zip archive, or in old versions a series of pickles."""
    import torch

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            corrupt = archive.testzip()
        return corrupt and f"its entry {corrupt} has a wrong checksum"
    with file.open("rb") as stream:
        if stream.read(len(_OLD_CHECKPOINT)) != _OLD_CHECKPOINT:
            return "cut off, or not a checkpoint of PyTorch"
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        return one_line(error)[:_MAX_LENGTH]
    return None
