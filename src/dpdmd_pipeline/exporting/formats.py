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

from dpdmd_pipeline.backbones.base import static_shift
from dpdmd_pipeline.backbones.lora import add_lora, kohya_from_peft, transformer_from_peft
from dpdmd_pipeline.backbones.networks import COMPONENTS, WEIGHTS, check_keys, network_files
from dpdmd_pipeline.backbones.student_file import check_family, load_header, load_lora, weight_file
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import load_tensors, refuse_pickles, save_weights, stored_shapes
from dpdmd_pipeline.exporting.schedulers import trained_schedule

_COPIED = {".json", ".model", ".safetensors", ".txt"}
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
    network = network_files(teacher / component(teacher))
    header = replace(header, resolution=resolution, max_sequence_length=max_sequence_length)
    if header.prediction == "flow" and header.shift is None:  # students of older versions
        header = replace(header, shift=float(static_shift(teacher_scheduler(teacher), teacher)))
    if header.kind == "full":
        check_keys([path], stored_shapes(network))
        return Student(header, load_tensors(path), None)
    adapter, _ = load_lora(path)
    weights = {name: tensor.float() for file in network for name, tensor in load_tensors(file).items()}
    add_lora(weights, adapter, header.lora_alpha / header.lora_rank)
    return Student(header, weights, adapter)


def component(pipeline: Path) -> str:
    """Name of the denoising network in a pipeline's folder."""
    index = _model_index(pipeline)
    for name in COMPONENTS:
        if name in index:
            return name
    raise ValueError(
        f"{pipeline / 'model_index.json'} names no {' or '.join(COMPONENTS)}: give a text-to-image pipeline"
    )


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
    return _json(teacher / "scheduler" / "scheduler_config.json")


# ---- writing


def write_diffusers(folder: Path, student: Student, teacher: Path, about: About) -> None:
    """Write a whole pipeline into a new folder: the teacher's, with the student's network and schedule."""
    network, index = component(teacher), _model_index(teacher)
    folder.mkdir(parents=True)
    for name in sorted(name for name, value in index.items() if isinstance(value, list) and value[0]):
        if name not in ("scheduler", network):
            _copy_component(teacher / name, folder / name)
    scheduler = trained_schedule(student.header, teacher_scheduler(teacher)).scheduler
    scheduler.save_pretrained(folder / "scheduler")
    (folder / network).mkdir()
    _write_json(folder / network / "config.json", _json(teacher / network / "config.json"))
    _save(folder / network / WEIGHTS, student.weights, _as_full(student.header), about)
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    _write_json(folder / "model_index.json", index)


def write_comfyui(path: Path, student: Student, about: About) -> None:
    """Write one file with diffusers' own keys, which ComfyUI loads from `models/diffusion_models`.

    A prefix such as ``transformer.`` would make ComfyUI's loader fail.
    """
    _save(path, student.weights, _as_full(student.header), about)


def write_lora(path: Path, student: Student, network: str, about: About) -> None:
    """Write a LoRA that diffusers and ComfyUI load with the right scale.

    A ``transformer`` gets a prefix, and the scale in B; a ``unet`` gets kohya's keys, with alpha.
    """
    header = student.header
    if network == "unet":
        tensors = kohya_from_peft(student.adapter, header.lora_alpha)
    else:
        tensors = transformer_from_peft(student.adapter, header.lora_alpha / header.lora_rank)
        header = replace(header, lora_alpha=float(header.lora_rank))
    _save(path, tensors, header, about)


def _as_full(header: StudentHeader) -> StudentHeader:
    """Header of weights after a LoRA was added to them."""
    return replace(header, kind="full", lora_rank=None, lora_alpha=None)


def _save(path: Path, weights: Mapping[str, Tensor], header: StudentHeader, about: About) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # kohya's alphas are scalars: half precision would change the scale
    cast = {name: value if name.endswith(".alpha") else value.to(about.dtype) for name, value in weights.items()}
    save_weights(path, cast, header.metadata() | modelspec(header, about))


# ---- files of a teacher


def hub_id(teacher: Path) -> str | None:
    """Hub id of a teacher in the hub's cache, models--<owner>--<name>/snapshots/<commit>; None for other folders."""
    if teacher.parent.name != "snapshots":
        return None
    kind, *owner_and_name = teacher.parent.parent.name.split("--")
    return "/".join(owner_and_name) if kind == "models" and len(owner_and_name) == 2 else None


def _copy_component(source: Path, target: Path) -> None:
    """Copy one component of a pipeline without its pickles; it must have other weights."""
    files = [path for path in sorted(source.rglob("*")) if path.is_file()]
    if not any(path.suffix == ".safetensors" for path in files):
        refuse_pickles(files)
    for path in files:
        if path.suffix in _COPIED:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _model_index(pipeline: Path) -> dict[str, Any]:
    path = pipeline / "model_index.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the folder of a diffusers pipeline")
    return _json(path)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    content = {key: value for key, value in content.items() if key != "_name_or_path"}  # a path on this machine
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
