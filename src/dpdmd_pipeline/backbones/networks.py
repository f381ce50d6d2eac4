"""Networks of a diffusers pipeline: hold their files against their class, then load them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
        ValueError, OSError: see `network_config` and `check_network`.
    """
    config = network_config(kind, folder)
    with torch.device("meta"):
        check_network(folder, kind.from_config(config))
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def load_autoencoder(kind: Any, pipeline: Path, device: torch.device) -> nn.Module:
    """Load the autoencoder of a pipeline, frozen and in float32: SDXL's overflows in float16."""
    return kind.from_pretrained(pipeline, subfolder="vae", dtype=torch.float32).to(device).requires_grad_(False)


def network_config(kind: Any, folder: Path) -> dict[str, Any]:
    """Read the config of a network's folder.

    Args:
        kind: the family's diffusers class.
        folder: of the network, such as a pipeline's ``transformer``.

    Raises:
        FileNotFoundError: if there is no config.
        ValueError: if the network is of another class.
    """
    remedy = "give a teacher of backbone.family, or set that to the teacher's own"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: {remedy}")
    config = kind.load_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, the family has a {kind.__name__}: {remedy}")
    return config


def check_network(folder: Path, model: nn.Module) -> None:
    """Hold the weight files of a network's folder against its architecture.

    Args:
        folder: of one network; its weights are in one safetensors file, or in several with an index.
        model: made from the folder's config; its weights are not used.

    Raises:
        ValueError: if keys or shapes differ.
        OSError: if safetensors files are missing or incomplete.
    """
    check_keys(network_files(folder), {name: tuple(value.shape) for name, value in model.state_dict().items()})


def network_files(folder: Path) -> list[Path]:
    """List the safetensors files of a network's folder: the single one, or those of the index.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if there are only pickles, or both a single file and an index.
    """
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


def check_keys(paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold weight files against a network: the same names with the same shapes, no more and no less.

    Raises:
        ValueError: with the first names that differ.
    """
    stored = stored_shapes(paths)
    resized = [name for name in stored.keys() & shapes.keys() if stored[name] != tuple(shapes[name])]
    faults = {
        "unknown": sorted(stored.keys() - shapes.keys()),
        "missing": sorted(shapes.keys() - stored.keys()),
        "resized": [f"{name} {list(stored[name])} instead of {list(shapes[name])}" for name in sorted(resized)],
    }
    counts = [f"{len(keys)} {fault} ({listed(keys, FEW)})" for fault, keys in faults.items() if keys]
    if counts:
        raise ValueError(f"{paths[0]} does not fit the network: keys {' and '.join(counts)}")
