"""One student in three forms: a diffusers pipeline's folder, a ComfyUI file, a LoRA file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.base import static_shift
from dpdmd_pipeline.backbones.limits import read_json
from dpdmd_pipeline.backbones.lora import add_lora, kohya_from_peft, peft_from_file, transformer_from_peft
from dpdmd_pipeline.backbones.networks import WEIGHTS, check_keys, network_files
from dpdmd_pipeline.backbones.student_file import check_family, load_header, load_lora, weight_file
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import load_metadata, load_tensors, save_weights, stored_shapes
from dpdmd_pipeline.exporting.rounding import Loss, check_underflow, lora_loss
from dpdmd_pipeline.exporting.schedulers import trained_schedule

_COPIED = {".json", ".model", ".txt"}
_WEIGHT_NAMES = {"diffusers": WEIGHTS, "transformers": "model.safetensors"}  # by the library of a component
# names of the ModelSpec convention and of the trainers that write it
_ARCHITECTURES = {"sd3": "stable-diffusion-3", "sdxl": "stable-diffusion-xl-v1-base"}
_MODELSPEC_PREDICTION = {"eps": "epsilon", "v": "v"}


@dataclass(frozen=True)
class Student:
    """A student that fits its teacher, ready to be written."""

    header: StudentHeader  # with every fact that an exported file needs on its own
    weights: dict[str, Tensor]  # of the whole network; a LoRA is already added
    adapter: dict[str, Tensor] | None  # the LoRA itself, with peft's keys; None for a full student


def read_student(folder: Path, teacher: Path, family: str, resolution: int, max_sequence_length: int) -> Student:
    """Load a trained student, hold it against its teacher, and complete its header.

    The resolution (in pixels) and the sequence length (in tokens of T5) are those of the training.

    Raises:
        ValueError: if it is of another family, or its keys or shapes differ from the network's.
        OSError: if a file is missing or incomplete.
    """
    path, header = weight_file(folder), load_header(folder)
    check_family(path, header, family)
    network = network_files(network_folder(teacher))
    header = replace(header, resolution=resolution, max_sequence_length=max_sequence_length)
    if header.prediction == "flow" and header.shift is None:  # students of older versions
        header = replace(header, shift=float(static_shift(teacher_scheduler(teacher), teacher)))
    if header.kind == "full":
        check_keys([path], stored_shapes(network))
        return Student(header, load_tensors(path), None)
    adapter, _ = load_lora(path)
    weights = {name: tensor.float() for file in network for name, tensor in load_tensors(file).items()}
    add_lora(weights, adapter, header.lora_scale)
    return Student(header, weights, adapter)


@dataclass(frozen=True)
class About:
    """Facts that every weight file of an export shares."""

    title: str  # of the model
    licence: str | None  # of its weights; None if it is unknown
    dtype: torch.dtype  # of its weights


def modelspec(header: StudentHeader, about: About) -> dict[str, str]:
    """Metadata that other programs display (the ModelSpec convention of Stability AI)."""
    architecture = _ARCHITECTURES.get(header.family, header.family)
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora" if header.kind == "lora" else architecture,
        "implementation": "diffusers",
        "title": about.title,
        "license": about.licence,
        "prediction_type": _MODELSPEC_PREDICTION.get(header.prediction),
        "resolution": header.resolution and f"{header.resolution}x{header.resolution}",
    }
    return {f"modelspec.{key}": value for key, value in fields.items() if value}


def teacher_scheduler(teacher: Path) -> dict[str, Any]:
    """The config of the teacher's own scheduler."""
    return read_json(teacher / "scheduler" / "scheduler_config.json")


# ---- writing


def write_diffusers(folder: Path, student: Student, teacher: Path, about: About) -> None:
    """Write a whole pipeline into a new folder: the teacher's, with the student's network and schedule."""
    network, index = network_folder(teacher), read_json(teacher / "model_index.json")
    for name, value in sorted(index.items()):
        if isinstance(value, list) and value[0] and name not in ("scheduler", network.name):
            _copy_component(teacher / name, folder / name, value[0], about.dtype)
    scheduler = trained_schedule(student.header, teacher_scheduler(teacher)).scheduler
    scheduler.save_pretrained(folder / "scheduler")
    _save(folder / network.name / WEIGHTS, student.weights, _as_full(student.header), about)
    _write_json(folder / network.name / "config.json", read_json(network / "config.json"))
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    _write_json(folder / "model_index.json", index)


def write_comfyui(path: Path, student: Student, about: About) -> None:
    """Write one file with diffusers' own keys, which ComfyUI loads from `models/diffusion_models`.

    A prefix such as ``transformer.`` would make ComfyUI's loader fail.
    """
    _save(path, student.weights, _as_full(student.header), about)


def write_lora(path: Path, student: Student, network: str, about: About) -> dict[str, Loss]:
    """Write a LoRA that diffusers and ComfyUI load with the right scale; returns the loss by its precision.

    A ``transformer`` gets a prefix, and the scale in B; a ``unet`` gets kohya's keys, with alpha.
    """
    header = student.header
    if network == "unet":
        tensors = kohya_from_peft(student.adapter, header.lora_alpha)
    else:
        tensors = transformer_from_peft(student.adapter, header.lora_scale)
        header = replace(header, lora_alpha=float(header.lora_rank))
    check_underflow(tensors, about.dtype)
    _save(path, tensors, header, about)
    modules = [name.removesuffix(".weight") for name in student.weights]
    stored = peft_from_file(load_tensors(path), modules)
    return lora_loss(student.adapter, stored, student.header.lora_scale / header.lora_scale)


def _as_full(header: StudentHeader) -> StudentHeader:
    """Header of weights after a LoRA was added to them."""
    return replace(header, kind="full", lora_rank=None, lora_alpha=None)


def _save(path: Path, weights: Mapping[str, Tensor], header: StudentHeader, about: About) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # kohya's alphas are scalars: half precision would change the scale
    cast = {name: value if name.endswith(".alpha") else value.to(about.dtype) for name, value in weights.items()}
    save_weights(path, cast, header.metadata() | modelspec(header, about))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    content = {key: value for key, value in content.items() if key != "_name_or_path"}  # a path on this machine
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# ---- files of a teacher


def hub_id(teacher: Path) -> str | None:
    """Hub id of a teacher in the hub's cache, models--<owner>--<name>/snapshots/<commit>; None for other folders."""
    if teacher.parent.name != "snapshots":
        return None
    kind, *owner_and_name = teacher.parent.parent.name.split("--")
    return "/".join(owner_and_name) if kind == "models" and len(owner_and_name) == 2 else None


def _copy_component(source: Path, target: Path, library: str, dtype: torch.dtype) -> None:
    """Copy one component of a pipeline, with its weights in another precision, and without pickles and variants."""
    for path in sorted(source.rglob("*")):
        if path.suffix in _COPIED:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    if library not in _WEIGHT_NAMES or not (source / "config.json").is_file():
        return  # a tokenizer
    if library == "transformers":
        # Without an argument, diffusers loads its networks in float32, and a text encoder as its config says.
        config = read_json(source / "config.json") | {"dtype": "float32"}
        config.pop("torch_dtype", None)  # the name in older versions
        _write_json(target / "config.json", config)
    total = 0
    for path in network_files(source, _WEIGHT_NAMES[library]):
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in load_tensors(path).items()
        }
        save_weights(target / path.name, tensors, load_metadata(path) | {"format": "pt"})
        total += sum(value.nbytes for value in tensors.values())
    index = target / f"{_WEIGHT_NAMES[library]}.index.json"
    if index.is_file():
        _write_json(index, read_json(index) | {"metadata": {"total_size": total}})
