"""Networks without weights, from a teacher's configs alone: fake tensors on which the real code runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning
from dpdmd_pipeline.backbones.student_file import COMPONENTS


class WeightlessBackbone:
    """A backbone whose networks are on the meta device: they have shapes and no weights.

    Attributes:
        loaded: networks made so far.
    """

    def __init__(self, backbone: Backbone, teacher: Path) -> None:
        self._backbone, self._teacher = backbone, teacher
        self.loaded: list[nn.Module] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backbone, name)

    def load_model(self, folder: Path | None = None, *, float32: bool = False) -> nn.Module:
        """The denoising network on the meta device."""
        kind, component = _network(self._teacher)
        config = kind.load_config(self._teacher, subfolder=component)
        with torch.device("meta"):
            network = kind.from_config(config)
        # diffusers' own `to` warns of trained weights
        nn.Module.to(network, torch.float32 if float32 else self._backbone.dtype)
        self.loaded.append(network)
        return network


def network_class(teacher: Path) -> type:
    """Class of a pipeline's denoising network, by its index."""
    return _network(teacher)[0]


def _network(teacher: Path) -> tuple[Any, str]:
    """Class and name of a pipeline's denoising network."""
    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    name = next(name for name in COMPONENTS if name in index)
    return getattr(importlib.import_module(index[name][0]), index[name][1]), name


def conditioning_like(backbone: Backbone) -> Conditioning:
    """Tensors like the embeddings of one prompt, [1, ...], from the teacher's configs alone; they hold no numbers."""
    return {
        name: torch.empty(1, *shape, dtype=backbone.dtype, device="meta")
        for name, shape in backbone.conditioning_shapes().items()
    }


def move_to_fake_cpu(networks: Sequence[nn.Module]) -> None:
    """Replace meta tensors by fake ones (under a FakeTensorMode): meta has no autocast and no attention kernels."""
    replacements: dict[int, Tensor] = {}
    for module in {module: None for network in networks for module in network.modules()}:
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = replacements.setdefault(id(tensor), _empty_like(tensor))


def _empty_like(tensor: Tensor) -> Tensor:
    empty = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each storage once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
