"""The folder of one export: its forms, an index of them, and the model card."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.exporting.card import FORMS, CardFacts, DiffusersUse, Licence, write_card
from dpdmd_pipeline.exporting.formats import (
    About,
    Student,
    component,
    load_student,
    schedule_of,
    teacher_scheduler,
    write_comfyui,
    write_diffusers,
    write_lora,
)
from dpdmd_pipeline.exporting.schedulers import static_shift


def read_student(student: Path, teacher: Path, family: str, resolution: int, max_sequence_length: int) -> Student:
    """A trained student, with what a file that is moved alone must tell besides the levels.

    Args:
        student, teacher, family: as in `load_student`.
        resolution: it was trained at, in pixels.
        max_sequence_length: of T5, it was trained with.
    """
    found = load_student(student, teacher, family)
    facts = {"resolution": resolution, "max_sequence_length": max_sequence_length}
    if found.header.prediction == "flow" and found.header.shift is None:  # older students do not tell it
        facts["shift"] = static_shift(teacher_scheduler(teacher))
    return replace(found, header=replace(found.header, **facts))


@dataclass(frozen=True)
class Export:
    """Everything that decides an export.

    Attributes:
        student: with its weights.
        teacher: its diffusers pipeline directory.
        title: of the model; files are called so.
        formats: forms asked for; see `FORMS`.
        dtype: of the weights, as torch names it.
        license, license_name, license_link: as a hub's front matter has them; None if it is not known.
        base_model: hub id of the teacher; None if it is not known: the card then says its folder's name.
        options: option group to its options, for the card.
        metrics: of this student, as the evaluate stage writes them, for the card; {} if it was not measured.
    """

    student: Student
    teacher: Path
    title: str
    formats: Sequence[str]
    dtype: str
    license: str | None
    license_name: str | None
    license_link: str | None
    base_model: str | None
    options: Mapping[str, Mapping[str, Any]]
    metrics: Mapping[str, Any]

    @property
    def files(self) -> dict[str, str]:
        """Form to its path below the folder, of those that are written."""
        places = {"diffusers": "diffusers", **{form: f"{form}/{self.title}.safetensors" for form in FORMS[1:]}}
        return {form: places[form] for form in FORMS if form in self.formats and form not in self.left_out}

    @property
    def left_out(self) -> list[str]:
        """Forms asked for that the student has not."""
        return ["lora"] if "lora" in self.formats and self.student.adapter is None else []

    def write(self, folder: Path) -> None:
        """Write all of it into an empty folder.

        Raises:
            ValueError: if nothing is left to write, or weights are not finite in the dtype.
            OSError: if a file of the teacher is missing.
        """
        if not self.files:
            raise ValueError("export.formats=['lora'], but the student is of kind full: ask for diffusers or comfyui")
        about = About(self.title, self.license_name or self.license, getattr(torch, self.dtype))
        if "diffusers" in self.files:
            write_diffusers(folder / self.files["diffusers"], self.student, self.teacher, about)
        if "comfyui" in self.files:
            write_comfyui(folder / self.files["comfyui"], self.student, about)
        if "lora" in self.files:
            write_lora(folder / self.files["lora"], self.student, component(self.teacher), about)
        # a model folder has a config.json; this one says what lies in it
        index = {"title": self.title, "dtype": self.dtype, "files": self.files, **self.student.header.metadata()}
        (folder / "config.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(write_card(self._facts()), encoding="utf-8")

    def _facts(self) -> CardFacts:
        return CardFacts(
            title=self.title,
            licence=Licence(self.license, self.license_name, self.license_link),
            base_model=self.base_model,
            teacher_folder=self.teacher.name,
            header=self.student.header,
            dtype=self.dtype,
            files=self.files,
            diffusers=diffusers_use(self.student.header, self.teacher),
            options=self.options,
            metrics=self.metrics,
        )


def diffusers_use(header: StudentHeader, teacher: Path) -> DiffusersUse:
    """What diffusers must be told, from the signatures of the teacher's own pipeline and of the scheduler."""
    import diffusers

    index = json.loads((teacher / "model_index.json").read_text(encoding="utf-8"))
    pipeline, schedule = getattr(diffusers, index["_class_name"]), schedule_of(header, teacher)
    absent = {name for name, value in index.items() if value == [None, None]}
    facts = {
        "num_inference_steps": header.num_steps,
        "guidance_scale": header.guidance,
        **schedule.arguments,
        "height": header.resolution,
        "width": header.resolution,
        "max_sequence_length": header.max_sequence_length,
        "use_resolution_binning": False,  # SANA's would draw at another size and scale the picture
    }
    return DiffusersUse(
        load=dict.fromkeys(sorted(absent - set(pipeline._optional_components))),
        call={name: value for name, value in facts.items() if name in inspect.signature(pipeline.__call__).parameters},
        scheduler=type(schedule.scheduler).__name__,
        settings=_settings(schedule.scheduler),
        passes_generators=hasattr(pipeline, "prepare_extra_step_kwargs"),
    )


def _settings(scheduler: Any) -> dict[str, Any]:
    """Of a scheduler's config, what is not its class's default."""
    defaults = {name: value.default for name, value in inspect.signature(type(scheduler)).parameters.items()}
    return {name: value for name, value in scheduler.config.items() if name in defaults and value != defaults[name]}
