"""One student in three forms (a diffusers pipeline's folder, a ComfyUI file, a LoRA file) with a model card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.base import static_shift
from dpdmd_pipeline.backbones.lora import add_lora, kohya_from_peft, peft_from_file, transformer_from_peft
from dpdmd_pipeline.backbones.networks import WEIGHTS, check_keys, network_files
from dpdmd_pipeline.backbones.sizes import Resolution
from dpdmd_pipeline.backbones.student_file import check_family, load_header, load_lora, weight_file
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.backbones.tensor_files import load_metadata, load_tensors, save_weights, stored_shapes
from dpdmd_pipeline.exporting.card import write_card
from dpdmd_pipeline.exporting.comfyui import comfyui_weights
from dpdmd_pipeline.exporting.rounding import Loss, check_losses, check_underflow, lora_loss, merge_losses
from dpdmd_pipeline.exporting.schedulers import diffusers_use, teacher_scheduler, trained_schedule
from dpdmd_pipeline.limits import read_json, write_json

# diffusers stores no arguments of a call; its one place for other defaults is a pipeline's own class
_PIPELINE = """from diffusers import {name}

TRAINED = {call!r}


class TrainedPipeline({name}):
    \"""{name} with this student's steps, levels and guidance for arguments that a call leaves out.\"""

    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **TRAINED | kwargs)
"""
_COPIED = {".jinja", ".json", ".model", ".txt"}
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

    @property
    def merged_header(self) -> StudentHeader:
        """Header of the whole network's weights."""
        return replace(self.header, kind="full", lora_rank=None, lora_alpha=None)


def read_student(folder: Path, teacher: Path, family: str, resolution: Resolution, max_sequence_length: int) -> Student:
    """Load a trained student, hold it against its teacher, and complete its header.

    The resolution (see `backbones.sizes`) and the sequence length (in tokens of T5) are those of the training.

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


class Licence(NamedTuple):
    """Fields of a hub's front matter, None if unknown; name and link belong to the licence `other`."""

    license: str | None
    license_name: str | None
    license_link: str | None


@dataclass(frozen=True)
class Export:
    """Everything that an export depends on."""

    student: Student
    teacher: Path  # its diffusers pipeline directory
    title: str  # of the model, and name of its files
    formats: Sequence[str]  # requested forms: diffusers, comfyui, lora
    dtype: str  # of all weights in it, a name in torch
    licence: Licence
    base_model: str | None  # hub id of the teacher; None if unknown
    metrics: Mapping[str, Any]  # of this student, as the evaluate stage writes them; {} without measurements
    measure: str  # command that measures it and exports it again, for this environment

    @property
    def files(self) -> dict[str, str]:
        """Path below the folder of every form that is written."""
        paths = {"diffusers": "diffusers"} | {form: f"{form}/{self.title}.safetensors" for form in ("comfyui", "lora")}
        return {form: paths[form] for form in paths if form in self.formats and form not in self.left_out}

    @property
    def left_out(self) -> list[str]:
        """Requested forms that this student cannot have."""
        return ["lora"] if "lora" in self.formats and self.student.adapter is None else []

    def write(self, folder: Path) -> None:
        """Write all forms, an index and the model card into an empty folder; refuse weights not finite in the dtype."""
        if not self.files:
            raise ValueError("export.formats=['lora'], but the student is of kind full: add diffusers or comfyui")
        paths, student, losses = {form: folder / name for form, name in self.files.items()}, self.student, {}
        if "diffusers" in paths:
            self._write_diffusers(paths["diffusers"])
        if "comfyui" in paths:  # without a prefix: one such as `transformer.` would make ComfyUI's loader fail
            weights = comfyui_weights(student.header.family, student.weights)
            self._save(paths["comfyui"], weights, student.merged_header)
        if student.adapter and paths.keys() - {"lora"}:
            losses |= merge_losses(student.weights, student.adapter, student.header.lora_scale, self._dtype)
        if "lora" in paths:
            losses |= self._write_lora(paths["lora"])
        check_losses(losses, self._dtype)
        # a model folder has a config.json; this one is an index of the forms
        index = {"title": self.title, "dtype": self.dtype, "files": self.files, **student.header.metadata()}
        (folder / "config.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        card = write_card(self, diffusers_use(student.header, self.teacher), losses)
        (folder / "README.md").write_text(card, encoding="utf-8")

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def _write_diffusers(self, folder: Path) -> None:
        """Write a whole pipeline into a new folder: the teacher's, with the student's network and schedule."""
        network, index = network_folder(self.teacher), read_json(self.teacher / "model_index.json")
        for name, value in sorted(index.items()):
            if isinstance(value, list) and value[0] and name not in ("scheduler", network.name):
                _copy_component(self.teacher / name, folder / name, value[0], self._dtype)
        scheduler = trained_schedule(self.student.header, teacher_scheduler(self.teacher)).scheduler
        scheduler.save_pretrained(folder / "scheduler")
        self._save(folder / network.name / WEIGHTS, self.student.weights, self.student.merged_header)
        write_json(folder / network.name / "config.json", read_json(network / "config.json"))
        write_json(folder / "model_index.json", index | {"scheduler": ["diffusers", type(scheduler).__name__]})
        call = dict(diffusers_use(self.student.header, self.teacher).call)
        code = _PIPELINE.format(name=index["_class_name"], call=call)
        (folder / "pipeline.py").write_text(code, encoding="utf-8")

    def _write_lora(self, path: Path) -> dict[str, Loss]:
        """Write a LoRA that diffusers and ComfyUI load with the right scale; returns the loss by its precision.

        A ``transformer`` gets a prefix, and the scale in B; a ``unet`` gets kohya's keys, with alpha.
        """
        adapter, header = self.student.adapter, self.student.header
        if network_folder(self.teacher).name == "unet":
            tensors = kohya_from_peft(adapter, header.lora_alpha)
        else:
            tensors = transformer_from_peft(adapter, header.lora_scale)
            header = replace(header, lora_alpha=float(header.lora_rank))
        check_underflow(tensors, self._dtype)
        self._save(path, tensors, header)
        stored = peft_from_file(load_tensors(path), [name.removesuffix(".weight") for name in self.student.weights])
        return lora_loss(adapter, stored, self.student.header.lora_scale / header.lora_scale)

    def _save(self, path: Path, weights: Mapping[str, Tensor], header: StudentHeader) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # kohya's alphas are scalars: half precision would change the scale
        cast = {name: value if name.endswith(".alpha") else value.to(self._dtype) for name, value in weights.items()}
        save_weights(path, cast, header.metadata() | self._modelspec(header))

    def _modelspec(self, header: StudentHeader) -> dict[str, str]:
        """Metadata that other programs display (the ModelSpec convention of Stability AI)."""
        architecture = _ARCHITECTURES.get(header.family, header.family)
        fields = {
            "sai_model_spec": "1.0.0",
            "architecture": f"{architecture}/lora" if header.kind == "lora" else architecture,
            "implementation": "diffusers",
            "title": self.title,
            "license": self.licence.license_name or self.licence.license,
            "prediction_type": _MODELSPEC_PREDICTION.get(header.prediction),
            "resolution": header.sizes and "x".join(map(str, reversed(header.sizes[0]))),  # width first
        }
        return {f"modelspec.{key}": value for key, value in fields.items() if value}


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
        write_json(target / "config.json", config)
    total = 0
    for path in network_files(source, _WEIGHT_NAMES[library]):
        tensors = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in load_tensors(path).items()
        }
        save_weights(target / path.name, tensors, load_metadata(path) | {"format": "pt"})
        total += sum(value.nbytes for value in tensors.values())
    index = target / f"{_WEIGHT_NAMES[library]}.index.json"
    if index.is_file():
        write_json(index, read_json(index) | {"metadata": {"total_size": total}})
