"""The file that a command is to write, looked at before the work that fills it."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_SYSTEM = ("/dev", "/proc")  # where `publishing.write_text` writes in place too


def refuse_unwritable(option: str, path: Path) -> None:
    """Say now what `publishing.write_text` would say after everything was measured.

    Args:
        option: that names the file.
        path: of it; it may be a link, a pipe or a device.

    Raises:
        OSError: if there is no folder for it, or it may not be written; names the file and the remedy.
    """
    is_stream = path.exists() and not path.is_file()
    in_place = is_stream or any(path.absolute().is_relative_to(system) for system in _SYSTEM)
    if in_place and path.exists():
        if not os.access(path, os.W_OK):
            raise OSError(f"{option} {path} may not be written: choose another file")
        return
    folder = path.absolute().parent if in_place else path.resolve().parent  # a link stays one: what counts is its end
    if not folder.is_dir():
        raise OSError(f"{option} {path}: there is no folder {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # modes alone do not tell: of /sys they say that root may
    except OSError as error:
        told = f"{option} {path}: nothing can be written in {folder} ({error.strerror})"
        raise OSError(f"{told}: make it writable, or choose another file") from error
