"""Libraries that compute metrics: their versions, and loading of their checkpoints without downloads."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

from dpdmd_pipeline.metrics.errors import UnavailableError, not_installed

LIBRARIES = ("open_clip_torch", "pillow", "timm", "torch", "torchmetrics", "torchvision", "transformers")


def versions(libraries: Iterable[str] = LIBRARIES) -> dict[str, str]:
    """Version of each library; empty if it is not installed, or without metadata."""
    installed = {name: next(iter(distributions(name=name)), None) for name in libraries}
    return {name: package.version if package else "" for name, package in installed.items()}


def from_torchmetrics(module: str, name: str) -> Any:
    """Import a class of torchmetrics.

    Raises:
        MissingLibraryError: if torchmetrics is not installed.
    """
    try:
        return getattr(importlib.import_module(f"torchmetrics.{module}"), name)
    except ImportError as error:
        raise not_installed("torchmetrics") from error


@contextmanager
def hub_folder(root: Path) -> Iterator[None]:
    """Point torch.hub at the checkpoints below `root` while a model is built.

    Downloads by torch.hub, pyiqa and the Hub's client are refused: they would also replace files that differ.
    """
    import urllib.request

    import torch
    from huggingface_hub import constants

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(Path(root) / "hub"))
    try:
        with (
            patch.object(torch.hub, "urlopen", _refuse),
            patch.object(urllib.request, "urlopen", _refuse),
            patch.object(constants, "HF_HUB_OFFLINE", True),
        ):
            yield
    finally:
        torch.hub.set_dir(before)


def _refuse(request: Any, *args: Any, **options: Any) -> NoReturn:
    address = getattr(request, "full_url", request)
    raise UnavailableError(
        f"the local copy of {address} is missing or differs from the published file, and metrics download nothing: "
        "fetch it again"
    )
