"""Teacher First Step: the teacher decides the composition, the student finishes."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import comfy.model_patcher
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ..schedules import MAX_STEPS
from .model import family_of, levels_of
from .schema import schema


class DPDMDFirstStepGuider(io.ComfyNode):
    """A GUIDER that runs the first steps with the teacher and the rest with the student."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDFirstStepGuider",
            aliases=["first step", "few step"],
            display_name="Teacher First Step",
            description="Takes the first step or steps with the teacher and guidance, the rest with the student: the "
            "teacher's composition at little more than the student's cost. For SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("student", tooltip="The student: a full one, or the teacher with a student's LoRA."),
                io.Model.Input("teacher", tooltip="The model that the student was distilled from."),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="The negative prompt, for the teacher. The student uses it only if one of its patches asks "
                    "for it.",
                ),
                io.Int.Input(
                    "teacher_steps",
                    default=1,
                    min=1,
                    max=MAX_STEPS - 1,
                    tooltip="Number of first steps that the teacher takes; each is two network calls.",
                ),
                io.Float.Input(
                    "teacher_cfg", default=3.5, min=1.0, max=30.0, step=0.1, tooltip="The teacher's guidance scale."
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, student, teacher, positive, negative, teacher_steps, teacher_cfg) -> io.NodeOutput:
        check_models(student, teacher, names=("student", "teacher"))
        guider = TeacherFirstGuider(teacher, student, teacher_steps)
        guider.set_conds(positive, negative)
        guider.set_cfg(teacher_cfg)
        return io.NodeOutput(guider)


def check_models(
    student: comfy.model_patcher.ModelPatcher, teacher: comfy.model_patcher.ModelPatcher, names: tuple[str, str]
) -> None:
    """Refuse two models that cannot draw one picture.

    Args:
        names: of the inputs for student and teacher, for the message.
    """
    of_student, of_teacher = _kind(student), _kind(teacher)
    if of_student != of_teacher:
        raise ValueError(
            f"{' and '.join(names)} differ: {of_student} and {of_teacher}: connect the model that the few-step model "
            f"was distilled from to {names[1]}"
        )
    if patches := _patches_of_runs(student):
        raise ValueError(
            f"{names[0]} carries {patches}, which works on whole runs, and here it takes only the last steps: remove "
            f"the patch from {names[0]}"
        )


def _kind(model: comfy.model_patcher.ModelPatcher) -> str:
    """Family, prediction and latent format; teacher and student must agree in all three."""
    latent_format = type(model.get_model_object("latent_format")).__name__
    return f"{family_of(model)} {levels_of(model).prediction} {latent_format}"


def _patches_of_runs(model: comfy.model_patcher.ModelPatcher) -> str:
    """Names of a model's patches that wrap a whole run of the sampler, such as EasyCache."""
    kinds = comfy.patcher_extension.WrappersMP
    return ", ".join(
        str(name or "a patch")
        for kind in (kinds.OUTER_SAMPLE, kinds.SAMPLER_SAMPLE)
        for name in model.wrappers.get(kind, {})
    )


class _Start(NamedTuple):
    """Inputs of a run, kept until the student's first step needs them for its conditioning."""

    noise: Tensor
    latent_image: Tensor | None
    device: torch.device
    conditions: dict


class TeacherFirstGuider(comfy.samplers.CFGGuider):
    """Guides with the teacher down to a level, and with the student from there on.

    The student is loaded at its first step. So teacher and student may be one model with and without a LoRA, and need
    not fit into memory together. Each model's patches and wrappers work in its own steps only.
    """

    def __init__(self, teacher, student, teacher_steps: int) -> None:
        super().__init__(teacher)
        self.student, self.teacher_steps = comfy.samplers.CFGGuider(student), teacher_steps
        self.last_teacher_sigma = 0.0
        self.start: _Start | None = None
        self.student_extras: list | None = None  # models loaded with the student, such as a ControlNet

    def outer_sample(self, *args, **kwargs) -> Tensor:
        try:
            return super().outer_sample(*args, **kwargs)
        finally:
            self._release_student()

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs) -> Tensor:
        steps = len(sigmas) - 1
        if not isinstance(self.teacher_steps, Integral) or not 1 <= self.teacher_steps < steps:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps} of {steps} steps: "
                "set a whole number that leaves each model at least one"
            )
        self.last_teacher_sigma = float(sigmas[self.teacher_steps - 1])
        # the student's guidance scale is 1: it evaluates the negative prompt only if a patch asks ComfyUI for it
        self.student.conds = {kind: [dict(cond) for cond in conds] for kind, conds in self.conds.items()}
        extra = {name: kwargs[name] for name in ("latent_shapes",) if name in kwargs}  # newer versions of ComfyUI
        self.start = _Start(noise, latent_image, device, {"denoise_mask": denoise_mask, **extra})
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    def outer_predict_noise(self, x, timestep, model_options: dict, seed=None) -> Tensor:
        if float(timestep.max()) >= self.last_teacher_sigma * (1 - 1e-6):
            return super().outer_predict_noise(x, timestep, model_options, seed)
        if self.student_extras is None:
            self._load_student(model_options["transformer_options"]["sample_sigmas"], seed)
        return self.student.outer_predict_noise(x, timestep, self.student.model_options, seed)

    def _load_student(self, sigmas: Tensor, seed: int | None) -> None:
        """Load the student in the way that CFGGuider loads its own model."""
        helpers, start, student = comfy.sampler_helpers, self.start, self.student
        patcher = student.model_patcher
        options = comfy.model_patcher.create_model_options_clone(patcher.model_options)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        student.model_options = options
        helpers.prepare_model_patcher(patcher, student.conds, options)
        student.inner_model, conds, self.student_extras = helpers.prepare_sampling(
            patcher, start.noise.shape, student.conds, options
        )
        comfy.samplers.cast_to_load_options(options, device=start.device, dtype=patcher.model_dtype())
        patcher.pre_run()
        latent_image = start.latent_image
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = student.inner_model.process_latent_in(latent_image)
        student.conds = comfy.samplers.process_conds(
            student.inner_model, start.noise, conds, start.device, latent_image, seed=seed, **start.conditions
        )

    def _release_student(self) -> None:
        if self.student_extras is not None:
            self.student.model_patcher.cleanup()
            comfy.sampler_helpers.cleanup_models(self.student.conds, self.student_extras)
            self.student_extras = None
