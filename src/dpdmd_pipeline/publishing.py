"""Folders and files that are there whole or not at all: staged beside their place, then renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError


@dataclass(frozen=True)
class Folders:
    """A published folder and its hidden siblings (on the same disk, so that renames are atomic)."""

    published: Path

    @classmethod
    def of(cls, filepath: Path) -> Folders:
        # A link to a bigger disk must stay a link: the siblings live where it points.
        return cls(filepath.resolve())

    def _sibling(self, ending: str) -> Path:
        return self.published.with_name(f".{self.published.name}.{ending}")

    @property
    def partial(self) -> Path:
        return self._sibling("partial")

    @property
    def ready(self) -> Path:
        return self._sibling("ready")

    @property
    def old(self) -> Path:
        return self._sibling("old")

    @property
    def lock(self) -> Path:
        return self._sibling("lock")


_REMEDIES = {
    errno.ENOSPC: "free some space and run the same command again: what is finished is kept",
    errno.EDQUOT: "free some space and run the same command again: what is finished is kept",
    errno.EFBIG: "raise the file size limit and run the same command again: what is finished is kept",
    errno.EACCES: "make the folder writable and run the same command again",
    errno.EPERM: "make the folder writable and run the same command again",
    errno.EROFS: "the disk is mounted read-only: make it writable or choose another path",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError of what fails on the disk, with a path and a remedy; a full disk names neither by itself."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):  # it hides the system's error in its text
            found = re.search(r"os error (\d+)", str(error))
            if not found:
                raise
            number = int(found[1])
        reason = os.strerror(number) if number else str(error)
        remedy = _REMEDIES.get(number, "see to it and run the same command again")
        raise OSError(number, f"{reason} ({remedy})", str(getattr(error, "filename", None) or path)) from error


class HeldError(ValueError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def locked(folders: Folders) -> Iterator[None]:
    """Hold the folder for writing; the system lets go of it when the process ends, however it ends.

    Raises:
        HeldError: if another process is writing it; names that process.
    """
    with writing(folders.lock):
        folders.lock.parent.mkdir(parents=True, exist_ok=True)
        file = folders.lock.open("a+")
    with file:
        with writing(folders.lock):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise HeldError(
                    f"{folders.published} is being written by process {file.read().strip() or 'unknown'}: "
                    "wait until it has finished, then run again"
                ) from error
        with contextlib.suppress(OSError):  # a full disk: the lock holds without the number
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], Any], temporary: Path | None = None) -> None:
    """Write a file that is there whole or not at all, also after a power cut.

    Args:
        write: writes the file at the path it is given.
        temporary: that path, beside the file; None adds an ending, so that a killed process leaves one at the most.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            write(temporary)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()  # on a full disk, every byte counts
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file that a user has named, where other files are not ours to touch.

    A link stays a link, and what is no file, as a pipe or a device, is written to as it is.
    """
    is_stream = path.exists() and not path.is_file()
    if is_stream or any(path.absolute().is_relative_to(system) for system in ("/dev", "/proc")):
        with writing(path), path.open("w", encoding="utf-8") as file:
            file.write(text)
        return
    path = path.resolve()
    own = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), own)


@contextlib.contextmanager
def replacing(folders: Folders) -> Iterator[Path]:
    """A new folder to be filled, which then takes the old one's place; killed at any moment, one of the two is whole.

    Raises:
        HeldError: if another process is writing it.
        OSError: naming the path, if it cannot be written.
    """
    with locked(folders):
        recover(folders)
        with writing(folders.partial):
            delete(folders.partial)
            folders.partial.mkdir()
            try:
                yield folders.partial
            except Exception:  # half of it only fills the disk
                shutil.rmtree(folders.partial, ignore_errors=True)
                raise
        publish(folders)


def publish(folders: Folders) -> None:
    """Put the partial folder, now whole, in the place of the published one.

    From the first rename on, the new folder is whole under a name that says so, and `recover` finishes
    what a kill interrupts. Until then the old one is in its place.
    """
    with writing(folders.published):
        sync(folders.partial)
        folders.partial.rename(folders.ready)
    recover(folders)


def recover(folders: Folders) -> None:
    """Finish the publishing that a kill has interrupted, if there is one."""
    with writing(folders.published):
        if folders.ready.exists():
            if folders.published.exists():
                delete(folders.old)
                folders.published.rename(folders.old)
            folders.ready.rename(folders.published)
            sync(folders.published.parent)
        delete(folders.old)


def load_published(folders: Folders) -> Path | None:
    """The published folder, after finishing an interrupted publishing that left none; None without one."""
    if not folders.published.exists() and folders.ready.exists():
        with locked(folders):
            recover(folders)
    return folders.published if folders.published.exists() else None


def delete(folder: Path) -> None:
    """Remove a folder, if it is there."""
    if folder.exists():
        shutil.rmtree(folder)


def sha256(path: Path) -> str:
    """Of a file's content, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
