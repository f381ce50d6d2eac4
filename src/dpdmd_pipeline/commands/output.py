"""The output file of a command, checked before the work that fills it, and printing into closed pipes."""

from __future__ import annotations

import errno
import os
import sys
import tempfile
from pathlib import Path

_SYSTEM = ("/dev", "/proc")  # `publishing.write_text` writes in place there too


def refuse_unwritable(option: str, path: Path) -> None:
    """Raise the error of `publishing.write_text` before the work instead of after it.

    The path may be a link, a pipe or a device; `option` names it in the message.
    """
    try:
        path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(f"{option} {path} is a link that leads to itself: choose another file") from error
    is_stream = path.exists() and not path.is_file()
    in_place = is_stream or any(path.absolute().is_relative_to(system) for system in _SYSTEM)
    if in_place and path.exists():
        if not os.access(path, os.W_OK):
            raise OSError(f"{option} {path} may not be written: choose another file")
        return
    folder = path.absolute().parent if in_place else path.resolve().parent  # the target of a link counts
    if not folder.is_dir():
        raise OSError(f"{option} {path}: the folder {folder} does not exist")
    try:
        tempfile.TemporaryFile(dir=folder).close()  # modes are not enough: those of /sys allow root to write
    except OSError as error:
        raise OSError(
            f"{option} {path}: cannot write in {folder} ({error.strerror}): make it writable, or choose another file"
        ) from error


def say(text: str) -> None:
    """Print a text; if the reader has closed its pipe, as in `| head`, discard it and the rest without an error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
