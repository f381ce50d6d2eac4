"""Networks of a diffusers pipeline: hold their files against their class, then load them."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpdmd_pipeline.backbones.tensor_files import FEW, refuse_pickles, stored_shapes
from dpdmd_pipeline.wording import listed

WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name of a network's one weight file
COMPONENTS = ("transformer", "unet")  # names of the denoising network in a pipeline's folder


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a network from its folder to the CPU, if the weights are exactly those of its class.

    diffusers itself accepts the config of any class, reads pickles, and only warns of missing and unknown keys. All of
    that is refused before weights are read.

    Raises:
        ValueError: if the network is of another class, or keys or shapes differ.
        OSError: if there is no config, or safetensors files are missing or incomplete.
    """
    config = network_config(kind, folder)
    with torch.device("meta"):
        check_keys(network_files(folder), shapes_of(kind.from_config(config)))
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def load_part(library: str, name: str, folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Load a frozen text encoder or an autoencoder by its library and class, if its files have all its weights.

    The libraries themselves only warn of missing weights, and draw them at random. Without a `dtype` no weights are
    read: the network is on the meta device.
    """
    kind = getattr(importlib.import_module(library), name, None)
    if kind is None:
        raise ValueError(f"{folder}: {library} has no class {name}: update {library}")
    options = {
        "dtype": dtype,
        "use_safetensors": True,
        "device_map": None if dtype else "meta",
        "output_loading_info": True,
    }
    hide_progress_bars()
    with quiet():
        part, info = kind.from_pretrained(folder, **options)
    if missing := sorted(info["missing_keys"]):
        count = f"{len(missing)} weights ({listed(missing, FEW)})"
        raise ValueError(f"{folder} lacks {count} of its {name}: download or save it again")
    return part.requires_grad_(False)


def hide_progress_bars() -> None:
    """Disable the bars of diffusers and transformers: they draw one for every component they load."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings of diffusers and transformers, where this package reports the same or needs no report."""
    import diffusers
    import transformers

    loggers = diffusers.utils.logging.get_logger(), transformers.utils.logging.get_logger()
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def network_config(kind: Any, folder: Path) -> dict[str, Any]:
    """Read the config of a network's folder, which must be of this diffusers class."""
    remedy = "give a teacher of backbone.family, or set that to the teacher's own"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: {remedy}")
    config = kind.load_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, the family has a {kind.__name__}: {remedy}")
    return config


def network_files(folder: Path) -> list[Path]:
    """List the safetensors files of a network's folder: the single one, or those of the index."""
    single, index = folder / WEIGHTS, folder / f"{WEIGHTS}.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} has both {WEIGHTS} and an index of several files: delete the one you do not need")
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    refuse_pickles(sorted(folder.glob("*")))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    only = f" (only {listed(others, FEW)})" if others else ""
    raise FileNotFoundError(f"{single} does not exist{only}: save the network as safetensors")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_keys(paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold weight files against a network: the same names with the same shapes, no more and no less."""
    stored = stored_shapes(paths)
    resized = [name for name in stored.keys() & shapes.keys() if stored[name] != shapes[name]]
    faults = {
        "unknown": sorted(stored.keys() - shapes.keys()),
        "missing": sorted(shapes.keys() - stored.keys()),
        "resized": [f"{name} {list(stored[name])} instead of {list(shapes[name])}" for name in sorted(resized)],
    }
    counts = [f"{len(keys)} {fault} ({listed(keys, FEW)})" for fault, keys in faults.items() if keys]
    if counts:
        raise ValueError(f"{paths[0]} does not fit the network: keys {' and '.join(counts)}")
