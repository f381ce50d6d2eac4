"""Features on the disk: metrics that look at pictures through the same network look once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from torch import Tensor

from dpdmd_pipeline.metrics.embedders import Embedder
from dpdmd_pipeline.publishing import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class KeptFeatures:
    """An embedder whose features of a prompt are kept, a file each, and known again by the pictures' own pixels.

    So they do not depend on where the pictures lie, nor on which metric or process came first. A disk that is full
    costs time, never a metric: what cannot be kept is computed again.

    Args:
        embed: computes those that are not known.
        folder: of the files.
        network: what decides the features beside the pictures.
    """

    def __init__(self, embed: Embedder, folder: Path, network: str) -> None:
        self.embed, self.folder, self.network = embed, folder, network
        self._keeps = True

    def __call__(self, images: Sequence[Image]) -> Tensor:
        path = self.folder / f"{_digest(self.network, images)}.safetensors"
        known = _load(path)
        if known is not None:
            return known
        features = self.embed(images)
        if self._keeps:
            self._keep(path, features)
        return features

    def _keep(self, path: Path, features: Tensor) -> None:
        try:
            _write(path, features)
        except (OSError, SafetensorError) as error:
            self._keeps = False
            log.warning("features cannot be kept in %s (%s): every metric computes its own", self.folder, error)


def _digest(network: str, images: Sequence[Image]) -> str:
    """Of a network and of pictures in their order; hexadecimal."""
    digest = hashlib.blake2b(network.encode(), digest_size=16)
    for image in images:
        digest.update(f"\0{image.mode}{image.size}\0".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()


def _load(path: Path) -> Tensor | None:
    """Features that were kept; None if there are none, or not all of them."""
    from safetensors.torch import load_file

    try:
        return load_file(path)["features"]
    except (OSError, SafetensorError, KeyError):
        return None


def _write(path: Path, features: Tensor) -> None:
    """A file that is there whole or not at all, though two processes at once may have the same pictures."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    own = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    write_atomically(path, lambda temporary: save_file({"features": features.contiguous()}, temporary), own)
