"""Replace files and folders as a whole: they are written beside their target, then renamed.

A kill or a power cut at any moment leaves one complete version. A folder has hidden siblings on the same disk:

    anchors/              the published version
    .anchors.partial/     the next version, while it is written
    .anchors.ready/       the next version, complete and about to be published
    .anchors.old/         the previous version, while it is deleted
    .anchors.lock         locked by the process that writes; holds its id
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError


class Folders(NamedTuple):
    """A published folder and its siblings."""

    published: Path
    partial: Path
    ready: Path
    old: Path
    lock: Path

    @classmethod
    def of(cls, path: Path) -> Folders:
        path = link_target(path)  # a link to a bigger disk stays a link: the siblings lie beside its target
        return cls(path, *(path.with_name(f".{path.name}.{field}") for field in cls._fields[1:]))


def link_target(path: Path) -> Path:
    """The path without links; an OSError names a link that leads to itself."""
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{path} is a link that leads to itself: remove it") from error
    return Path(os.path.realpath(path))


# ---- errors of the disk

_FREE_SPACE = "free some space and run the same command again: finished work is kept"
_MAKE_WRITABLE = "make the folder writable and run the same command again"
REMEDIES = {
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "raise the file size limit and run the same command again: finished work is kept",
    errno.EACCES: _MAKE_WRITABLE,
    errno.EPERM: _MAKE_WRITABLE,
    errno.EROFS: "the disk is mounted read-only: make it writable or choose another path",
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Add the path and a remedy to OSErrors, and to the system's errors that safetensors reports; yields the path."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        number = getattr(error, "errno", None)
        if isinstance(error, SafetensorError):  # the system's error is in its text only
            match = re.search(r"os error (\d+)", str(error))
            if not match:
                raise
            number = int(match[1])
        reason = os.strerror(number) if number else str(error)
        remedy = REMEDIES.get(number, "fix the cause and run the same command again")
        raise OSError(number, f"{reason} ({remedy})", str(getattr(error, "filename", None) or path)) from error


# ---- one writer at a time


class LockedError(ValueError):
    """Another process is writing the folder."""


@contextlib.contextmanager
def locked(folders: Folders) -> Iterator[None]:
    """Lock a folder for writing; the system releases the lock when the process ends, however it ends.

    Raises a LockedError that names the process if another one is writing the folder.
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
                raise LockedError(
                    f"{folders.published} is being written by process {file.read().strip() or 'unknown'}: "
                    "wait until it has finished, then run again"
                ) from error
        with contextlib.suppress(OSError):  # on a full disk the lock holds without the id
            os.ftruncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


# ---- one file


def write_atomically(path: Path, write: Callable[[Path], Any], temporary: Path | None = None) -> None:
    """Write a file that is complete or absent, even after a power cut. Its mode is that of any new file.

    `write` gets the path of a temporary file beside it. The default is the same for every process, so that killed
    processes leave at most one; choose another where two processes may write the same file.
    """
    temporary = temporary or path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            mode = _mode_of_new_file(temporary)
            write(temporary)
            _set_mode(temporary, mode)
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()  # on a full disk, every byte counts
            raise


def write_text(path: Path, text: str) -> None:
    """Write a file that the user named; pipes, devices and the like are written in place.

    A link stays a link, except to a read-only file, as in DVC's cache: the new file replaces that link.
    """
    is_stream = path.exists() and not path.is_file()
    if is_stream or any(path.absolute().is_relative_to(system) for system in ("/dev", "/proc")):
        with writing(path):
            path.write_text(text, encoding="utf-8")
        return
    if not path.exists() or path.stat().st_mode & 0o222:
        path = link_target(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"), temporary)


# ---- one folder


@contextlib.contextmanager
def replacing(folders: Folders) -> Iterator[Path]:
    """Yield a new folder to fill, then publish it. The modes in it become those of any new file and folder.

    Raises a LockedError if another process is writing the folder, and an OSError with the path if that fails.
    """
    with locked(folders):
        recover(folders)
        with writing(folders.partial):
            _delete(folders.partial)
            folders.partial.mkdir()
            try:
                yield folders.partial
                _settle(folders.partial)
            except Exception:  # an incomplete folder only fills the disk
                shutil.rmtree(folders.partial, ignore_errors=True)
                raise
        publish(folders)


def publish(folders: Folders) -> None:
    """Replace the published folder by the partial one, which is complete now.

    After the first rename `recover` can finish what a kill interrupts; until then the old folder is in place.
    """
    with writing(folders.published):
        sync(folders.partial)
        folders.partial.rename(folders.ready)
    recover(folders)


def recover(folders: Folders) -> None:
    """Finish a publication that a kill interrupted, if there is one."""
    with writing(folders.published):
        if folders.ready.exists():
            if folders.published.exists():
                _delete(folders.old)
                folders.published.rename(folders.old)
            folders.ready.rename(folders.published)
            sync(folders.published.parent)
        _delete(folders.old)


def _delete(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


# ---- contents and modes

_HASHES: dict[tuple[int, ...], str] = {}  # by device, inode, size and time of the last change
_TICK = 10**9  # nanoseconds; file systems store the time of a change more coarsely than they show it


def sync(path: Path) -> None:
    """Flush a file, or the list of names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, hexadecimal. A process reads a file once, unless it changes."""
    status = path.stat()
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key not in _HASHES:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if time.time_ns() - status.st_mtime_ns < _TICK:  # the next change may get the same time
            return digest
        _HASHES[key] = digest
    return _HASHES[key]


def files_hash(folder: Path, paths: Iterable[Path]) -> str:
    """SHA-256 over the names below a folder and the contents of some files, hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(paths, key=Path.as_posix):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def _settle(folder: Path) -> None:
    """Set the usual modes below a folder and flush all of it to the disk."""
    probe = folder / ".mode"
    file_mode, folder_mode = _mode_of_new_file(probe), folder.stat().st_mode
    probe.unlink()
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            _set_mode(path, file_mode)
            sync(path)
        _set_mode(Path(parent), folder_mode)
        sync(Path(parent))


def _mode_of_new_file(path: Path) -> int:
    """Create a file for its mode; os.umask cannot be read without changing it for all threads."""
    path.touch()
    return path.stat().st_mode


def _set_mode(path: Path, mode: int) -> None:
    """Undo the private mode (0600) of files that a library made through a temporary file."""
    if not path.is_symlink() and path.stat().st_mode != mode:
        path.chmod(mode & 0o7777)
