"""A cache of features on disk, so that metrics of the same network run it once."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dpdmd_pipeline.metrics.embedders import Embedder
from dpdmd_pipeline.publishing import write_atomically

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)


class CachedFeatures:
    """An embedder that stores the features of each prompt in a file of `folder`, under a key of the pictures' pixels.

    A full disk costs time, never a metric: features that cannot be stored are computed again. `network` is the identity
    of the network, its output and its device.
    """

    def __init__(self, embed: Embedder, folder: Path, network: str) -> None:
        self.embed, self.folder, self.network = embed, folder, network
        self._can_store = True

    def __call__(self, images: Sequence[Image]) -> Tensor:
        path = self.folder / f"{_cache_key(self.network, images)}.safetensors"
        with suppress(OSError, SafetensorError, KeyError):  # it may be missing or incomplete
            return load_file(path)["features"]
        features = self.embed(images)
        if self._can_store:
            self._store(path, features)
        return features

    def _store(self, path: Path, features: Tensor) -> None:
        """Write the file atomically, also if another process writes the same pictures."""
        own = path.with_name(f"{path.stem}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary: save_file({"features": features.contiguous()}, temporary), own)
        except (OSError, SafetensorError) as error:
            self._can_store = False
            log.warning("cannot store features in %s (%s): every metric computes its own", self.folder, error)


def _cache_key(network: str, images: Sequence[Image]) -> str:
    """Cache key (hex) of a network and an ordered list of pictures."""
    digest = hashlib.blake2b(network.encode(), digest_size=16)
    for image in images:
        digest.update(f"\0{image.mode}{image.size}\0".encode())
        digest.update(image.tobytes())
    return digest.hexdigest()
