"""Draw pictures, and read them without root's rights."""

import os
from contextlib import contextmanager

from PIL import Image


def draw(path, size=(8, 8), colour="red", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


@contextmanager
def as_anyone(folder, monkeypatch):
    """Work in this folder with the rights of a user other than root."""
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
