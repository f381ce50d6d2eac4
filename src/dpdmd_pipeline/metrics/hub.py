"""Let libraries load their checkpoints from a local folder and download nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dpdmd_pipeline.metrics.errors import UnavailableError


@contextmanager
def hub_folder(root: Path) -> Iterator[None]:
    """Point torch.hub at the checkpoints below `root` and forbid downloads while a model is built."""
    import torch

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(Path(root) / "hub"))
    try:
        with _no_downloads():
            yield
    finally:
        torch.hub.set_dir(before)


@contextmanager
def _no_downloads() -> Iterator[None]:
    """Refuse downloads by torch.hub, pyiqa and the Hub's client, which also replace files that differ."""
    import urllib.request

    import torch
    from huggingface_hub import constants

    patches = (
        (torch.hub, "urlopen", _refuse),
        (urllib.request, "urlopen", _refuse),
        (constants, "HF_HUB_OFFLINE", True),
    )
    originals = [getattr(module, name) for module, name, _ in patches]
    for module, name, replacement in patches:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for (module, name, _), original in zip(patches, originals, strict=True):
            setattr(module, name, original)


def _refuse(request: Any, *args: Any, **options: Any) -> NoReturn:
    address = getattr(request, "full_url", request)
    raise UnavailableError(
        f"the local copy of {address} is missing or differs from the published file, and metrics download nothing: "
        "fetch it again"
    )
