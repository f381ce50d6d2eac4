"""The folder of one export: its forms, an index of them, and the model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch

from dpdmd_pipeline.backbones import network_folder
from dpdmd_pipeline.backbones.limits import read_json
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.exporting.card import FORMS, CardFacts, DiffusersUse, Licence, write_card
from dpdmd_pipeline.exporting.formats import (
    About,
    Student,
    teacher_scheduler,
    write_comfyui,
    write_diffusers,
    write_lora,
)
from dpdmd_pipeline.exporting.rounding import check_losses, merge_losses
from dpdmd_pipeline.exporting.schedulers import trained_schedule


@dataclass(frozen=True)
class Export:
    """Everything that an export depends on; see `CardFacts` for the facts that are on the card alone."""

    student: Student
    teacher: Path  # its diffusers pipeline directory
    title: str
    formats: Sequence[str]  # requested forms; see `FORMS`
    dtype: str  # of all weights in it, a name in torch
    licence: Licence
    base_model: str | None
    metrics: Mapping[str, Any]
    measure: str

    @property
    def files(self) -> dict[str, str]:
        """Path below the folder of every form that is written."""
        paths = {"diffusers": "diffusers", **{form: f"{form}/{self.title}.safetensors" for form in FORMS[1:]}}
        return {form: paths[form] for form in FORMS if form in self.formats and form not in self.left_out}

    @property
    def left_out(self) -> list[str]:
        """Requested forms that this student cannot have."""
        return ["lora"] if "lora" in self.formats and self.student.adapter is None else []

    def write(self, folder: Path) -> None:
        """Write all forms, an index and the model card into an empty folder; refuse weights not finite in the dtype."""
        if not self.files:
            raise ValueError("export.formats=['lora'], but the student is of kind full: add diffusers or comfyui")
        student, dtype, losses = self.student, getattr(torch, self.dtype), {}
        about = About(self.title, self.licence.license_name or self.licence.license, dtype)
        if "diffusers" in self.files:
            write_diffusers(folder / self.files["diffusers"], student, self.teacher, about)
        if "comfyui" in self.files:
            write_comfyui(folder / self.files["comfyui"], student, about)
        if student.adapter and self.files.keys() - {"lora"}:
            losses |= merge_losses(student.weights, student.adapter, student.header.lora_scale, dtype)
        if "lora" in self.files:
            losses |= write_lora(folder / self.files["lora"], student, network_folder(self.teacher).name, about)
        check_losses(losses, dtype)
        # a model folder has a config.json; this one is an index of the forms
        index = {"title": self.title, "dtype": self.dtype, "files": self.files, **student.header.metadata()}
        (folder / "config.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        facts = CardFacts(
            title=self.title,
            licence=self.licence,
            base_model=self.base_model,
            teacher_folder=self.teacher.name,
            header=student.header,
            dtype=self.dtype,
            files=self.files,
            diffusers=diffusers_use(student.header, self.teacher),
            losses=losses,
            metrics=self.metrics,
            measure=self.measure,
        )
        (folder / "README.md").write_text(write_card(facts), encoding="utf-8")


def diffusers_use(header: StudentHeader, teacher: Path) -> DiffusersUse:
    """Arguments for diffusers, from the signatures of the teacher's pipeline and of the scheduler."""
    index = read_json(teacher / "model_index.json")
    pipeline, schedule = getattr(diffusers, index["_class_name"]), trained_schedule(header, teacher_scheduler(teacher))
    absent = {name for name, value in index.items() if value == [None, None]}
    facts = {
        "num_inference_steps": header.num_steps,
        "guidance_scale": header.guidance,
        **schedule.arguments,
        "height": header.resolution,
        "width": header.resolution,
        "max_sequence_length": header.max_sequence_length,
        "use_resolution_binning": False,  # SANA's draws at another size and scales the picture
    }
    defaults = {name: value.default for name, value in inspect.signature(pipeline.__call__).parameters.items()}
    call = {name: value for name, value in facts.items() if name in defaults}
    return DiffusersUse(
        load=dict.fromkeys(sorted(absent - set(pipeline._optional_components))),
        call=call,
        defaults={name: defaults[name] for name in call if defaults[name] not in (None, call[name])},
        scheduler=type(schedule.scheduler).__name__,
        settings=_settings(schedule.scheduler),
        passes_generators=hasattr(pipeline, "prepare_extra_step_kwargs"),
    )


def _settings(scheduler: Any) -> dict[str, Any]:
    """Values of a scheduler's config that are not its class's defaults."""
    defaults = {name: value.default for name, value in inspect.signature(type(scheduler)).parameters.items()}
    return {name: value for name, value in scheduler.config.items() if name in defaults and value != defaults[name]}
