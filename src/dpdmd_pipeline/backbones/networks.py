"""Networks of a diffusers pipeline: hold their files against their class, then load them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.tensor_files import check_content, refuse_pickles, stored_shapes
from dpdmd_pipeline.limits import first_names, read_json
from dpdmd_pipeline.wording import one_line

_ORIGINAL = "model.diffusion_model."  # starts the network's keys in most single files of a model's authors
_FLUX = ("double_blocks.", "single_blocks.")  # in those of FLUX.2, without a prefix
WEIGHTS = "diffusion_pytorch_model.safetensors"  # diffusers' name of a network's one weight file


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a network from its folder to the CPU, if the weights are exactly those of its class.

    diffusers itself accepts the config of any class, reads pickles, and only warns of missing and unknown keys. All of
    that is refused before weights are read.

    Raises:
        ValueError: if the network is of another class, or keys or shapes differ.
        OSError: if there is no config, or safetensors files are missing, incomplete or damaged.
    """
    config = network_config(kind, folder)
    files = network_files(folder)
    with torch.device("meta"):
        check_keys(files, shapes_of(kind.from_config(config)))
    for file in files:
        check_content(file)
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def network_config(kind: Any, folder: Path) -> dict[str, Any]:
    """Read the config of a network's folder, which must be of this diffusers class."""
    remedy = "give a teacher of backbone.family, or set that to the teacher's own"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: {remedy}")
    config = kind.load_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, the family has a {kind.__name__}: {remedy}")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(
            f"{folder} is quantised by {method}, which no student can be trained on: give the teacher in 16 bits, and "
            "set train.lora.base_weights to quantise the base of adapters"
        )
    return config


def network_files(folder: Path, name: str = WEIGHTS) -> list[Path]:
    """List the safetensors files of a network's folder: the single one of this name, or those of its index."""
    single, index = folder / name, folder / f"{name}.index.json"
    if single.is_file() and index.is_file():
        raise ValueError(f"{folder} has both {name} and an index of several files: delete the one you do not need")
    if single.is_file():
        return [single]
    if index.is_file():
        if not isinstance(weight_map := read_json(index).get("weight_map"), dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map: copy it again")
        return [folder / name for name in sorted(set(weight_map.values()))]
    refuse_pickles(sorted(folder.glob("*")))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    only = f" (only {first_names(others)})" if others else ""
    raise FileNotFoundError(f"{single} does not exist{only}: save the network as safetensors")


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a network's weights."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def check_keys(paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold weight files against a network: the same names with the same shapes, no more and no less."""
    check_shapes(paths[0], stored_shapes(paths), shapes)


def check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold the names and shapes in a file against a network's; see `check_keys`."""
    resized = [name for name in stored.keys() & shapes.keys() if stored[name] != shapes[name]]
    faults = {
        "unknown": sorted(stored.keys() - shapes.keys()),
        "missing": sorted(shapes.keys() - stored.keys()),
        "resized": [f"{name} {list(stored[name])} instead of {list(shapes[name])}" for name in sorted(resized)],
    }
    counts = [f"{len(keys)} {fault} ({first_names(keys)})" for fault, keys in faults.items() if keys]
    if counts:
        raise ValueError(f"{path} does not fit the network: keys {' and '.join(counts)}")


# ---- keys of a model's authors


def original_names(names: Iterable[str]) -> list[str]:
    """The network's keys in a single file of a model's authors; none in a file with diffusers' keys."""
    names = list(names)
    if any(name.startswith(_FLUX) for name in names):
        return names
    return [name for name in names if name.startswith(_ORIGINAL)]


def from_original(file: Path, tensors: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Convert the network of a single file to diffusers' keys, by diffusers' own mapping."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    convert = SINGLE_FILE_LOADABLE_CLASSES[type(network).__name__]["checkpoint_mapping_fn"]
    try:
        return convert(config=network.config, checkpoint=tensors)
    except Exception as error:  # whatever the mapping raises for keys that it misses
        raise ValueError(
            f"{file} has no {type(network).__name__} ({type(error).__name__}: {one_line(error)}): give one of the "
            "teacher's family"
        ) from error
