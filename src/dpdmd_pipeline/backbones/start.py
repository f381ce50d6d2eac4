"""Weights that training starts from instead of the teacher's: our students, LoRAs and checkpoints of other programs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, load_quietly, pipeline_class
from dpdmd_pipeline.backbones.lora import A, B, add_lora
from dpdmd_pipeline.backbones.networks import check_keys, check_shapes, from_original, original_names, shapes_of
from dpdmd_pipeline.backbones.student_file import (
    check_family,
    check_prediction,
    load_header,
    load_lora,
    load_weights,
    weight_file,
)
from dpdmd_pipeline.backbones.tensor_files import check_content, check_finite, open_tensors, stored_shapes
from dpdmd_pipeline.errors import MissingInputError
from dpdmd_pipeline.limits import first_names
from dpdmd_pipeline.wording import one_line


@dataclass(frozen=True)
class Start:
    """Weights for a network of the teacher's architecture."""

    file: Path
    family: str
    adapter: dict[str, Tensor] | None  # a LoRA with peft's keys, its scale multiplied into B; None: a whole network

    def load_into(self, network: nn.Module) -> None:
        """Replace a teacher's weights by these, in place, or add the LoRA to them."""
        if self.adapter is not None:
            add_lora(network.state_dict(), self.adapter, 1.0)
        else:
            load_weights(self.file, network, self.family)


def start_file(path: Path) -> Path:
    """Find the one file with a start's weights; see `weight_file`."""
    try:
        return weight_file(path)
    except MissingInputError as error:
        raise FileNotFoundError(
            f"start_from={path} has no weights: give a .safetensors file or a student's folder"
        ) from error


def load_start(path: Path, backbone: Backbone, family: str) -> Start:
    """Hold a file against the teacher's network and read its LoRA; whole weights are read by `load_into`.

    Args:
        path: a student's folder or export, a LoRA (of this project, diffusers, peft or kohya), or a checkpoint of the
            network (with diffusers' keys, or the single file of its authors).
        backbone: of the teacher, whose configs are enough.
        family: of the teacher.

    Raises:
        ValueError: if it is of another family or prediction type, or its keys or shapes differ from the network's.
        OSError: if it is missing, incomplete or damaged.
    """
    file, network = start_file(path), backbone.empty_model()
    with open_tensors(file) as tensors:
        is_student = "dpdmd.format" in (tensors.metadata() or {})
    shapes, adapter = stored_shapes([file]), None
    if is_student:
        header = load_header(file)
        check_family(file, header, family)
        check_prediction(file, header, backbone.prediction, backbone.folder)
    if is_student and header.kind == "lora":
        state, _ = load_lora(file, [name for name, _ in network.named_modules()])
        adapter = {name: header.lora_scale * value if name.endswith(B) else value for name, value in state.items()}
    elif any("lora" in name for name in shapes):
        adapter, others = read_lora(file, network, pipeline_class(family))
        if others:
            raise ValueError(f"{file} also changes the text encoders ({first_names(others)}): fuse it into the teacher")
    elif names := original_names(shapes):
        empty = {name: torch.empty(shapes[name], device="meta") for name in names}
        converted = from_original(file, empty, network)
        check_shapes(file, {name: tuple(value.shape) for name, value in converted.items()}, shapes_of(network))
    else:
        check_keys([file], shapes_of(network))
    if adapter is not None:
        add_lora(dict(backbone.empty_model().state_dict()), adapter, 1.0)  # checks names and shapes
    return Start(file, family, adapter)


def read_lora(file: Path, network: nn.Module, pipeline: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Read a LoRA of another program by diffusers' own converters.

    Args:
        file: in any layout that `load_lora_weights` reads.
        network: without weights; it gets the adapter.
        pipeline: diffusers' class of the family.

    Returns:
        The part for the network, with peft's keys and its scale multiplied into B; the keys for other parts.

    Raises:
        ValueError: if diffusers cannot read it, or some of its tensors belong to no layer of the network.
    """
    from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft

    check_content(file)
    prefix = getattr(pipeline, "transformer_name", None) or pipeline.unet_name
    options = {"unet_config": network.config} if prefix == "unet" else {}
    try:
        with load_quietly(), warnings.catch_warnings(action="ignore"):
            tensors, *alphas, metadata = pipeline.lora_state_dict(str(file), return_lora_metadata=True, **options)
            own = {name: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}
            facts = {"network_alphas": alphas[0] if alphas else None, "metadata": metadata}
            network.load_lora_adapter(own, prefix, adapter_name="read", low_cpu_mem_usage=True, **facts)
    except Exception as error:  # whatever the libraries raise for keys or shapes that they do not know
        raise ValueError(f"{file}: diffusers cannot read this LoRA: {one_line(error)}") from error
    scales = {name: layer.scaling["read"] for name, layer in network.named_modules() if hasattr(layer, "lora_A")}
    state = {name.removeprefix(f"{prefix}."): value.float() for name, value in own.items()}
    if not all(A in name or B in name for name in state):
        state = convert_unet_state_dict_to_peft(state)
    if not state or state.keys() != {name + ending for name in scales for ending in (A, B)}:
        text = f"{len(own)} of its {len(tensors)} tensors are for the {prefix}, {len(scales)} layers fit"
        raise ValueError(f"{file}: {text}: give a LoRA of this teacher")
    check_finite(file, state)
    scaled = {name: scales[name.removesuffix(B)] * value for name, value in state.items() if name.endswith(B)}
    return state | scaled, sorted(tensors.keys() - own.keys())
