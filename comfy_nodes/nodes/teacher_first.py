"""Teacher First Step: the teacher decides the composition, the student finishes."""

from __future__ import annotations

from numbers import Integral
from typing import NamedTuple

import comfy.model_patcher
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
            display_name="Teacher First Step",
            description="Takes the first step or steps with the teacher and guidance, the rest with the student: the "
            "teacher's composition at little more than the student's cost. For SamplerCustomAdvanced.",
            inputs=[
                io.Model.Input("student", tooltip="The student: a full one, or the teacher with a student's LoRA."),
                io.Model.Input("teacher", tooltip="The model that the student was distilled from."),
                io.Conditioning.Input("positive", tooltip="The prompt, for both."),
                io.Conditioning.Input("negative", tooltip="The negative prompt; only the teacher uses it."),
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
        check_kinds(student, teacher, names=("student", "teacher"))
        guider = TeacherFirstGuider(teacher, student, teacher_steps)
        guider.set_conds(positive, negative)
        guider.set_cfg(teacher_cfg)
        return io.NodeOutput(guider)


def check_kinds(
    model: comfy.model_patcher.ModelPatcher, other: comfy.model_patcher.ModelPatcher, names: tuple[str, str]
) -> None:
    """Refuse two models that cannot draw one picture.

    Args:
        names: of the two inputs, for the message.
    """
    kinds = _kind(model), _kind(other)
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"{' and '.join(names)} differ: {kinds[0]} and {kinds[1]}: connect the model that the few-step model was "
            "distilled from"
        )


def _kind(model: comfy.model_patcher.ModelPatcher) -> str:
    """Family, prediction and latent format; teacher and student must agree in all three."""
    latent_format = type(model.get_model_object("latent_format")).__name__
    return f"{family_of(model)} {levels_of(model).prediction} {latent_format}"


class _Start(NamedTuple):
    """Inputs of a run, kept until the student's first step needs them for its conditioning."""

    noise: Tensor
    latent_image: Tensor | None
    device: torch.device
    conditions: dict


class TeacherFirstGuider(comfy.samplers.CFGGuider):
    """Guides with the teacher down to a level, and with the student from there on.

    The student is loaded at its first step. So teacher and student may be one model with and without a LoRA, and need
    not fit into memory together.
    """

    def __init__(self, teacher, student, teacher_steps: int) -> None:
        super().__init__(teacher)
        self.student, self.teacher_steps = student, teacher_steps
        self.last_teacher_sigma = 0.0
        self.start: _Start | None = None
        self.student_conds: dict = {}
        self.student_options: dict = {}  # set when the student is loaded
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
        self.student_conds = {"positive": [dict(cond) for cond in self.conds["positive"]]}
        extra = {name: kwargs[name] for name in ("latent_shapes",) if name in kwargs}  # newer versions of ComfyUI
        self.start = _Start(noise, latent_image, device, {"denoise_mask": denoise_mask, **extra})
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    def predict_noise(self, x, timestep, model_options: dict, seed=None) -> Tensor:
        if float(timestep.max()) >= self.last_teacher_sigma * (1 - 1e-6):
            return super().predict_noise(x, timestep, model_options, seed)
        if self.student_extras is None:
            self._load_student(model_options["transformer_options"]["sample_sigmas"], seed)
        return comfy.samplers.sampling_function(
            self.student.model, x, timestep, None, self.student_conds["positive"], 1.0, self.student_options, seed
        )

    def _load_student(self, sigmas: Tensor, seed: int | None) -> None:
        """Load the student in the way that CFGGuider loads its own model."""
        helpers, start = comfy.sampler_helpers, self.start
        options = comfy.model_patcher.create_model_options_clone(self.student.model_options)
        options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        self.student_options = options
        helpers.prepare_model_patcher(self.student, self.student_conds, options)
        model, conds, self.student_extras = helpers.prepare_sampling(
            self.student, start.noise.shape, self.student_conds, options
        )
        comfy.samplers.cast_to_load_options(options, device=start.device, dtype=self.student.model_dtype())
        self.student.pre_run()
        latent_image = start.latent_image
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = model.process_latent_in(latent_image)
        self.student_conds = comfy.samplers.process_conds(
            model, start.noise, conds, start.device, latent_image, seed=seed, **start.conditions
        )

    def _release_student(self) -> None:
        if self.student_extras is not None:
            self.student.cleanup()
            comfy.sampler_helpers.cleanup_models(self.student_conds, self.student_extras)
            self.student_extras = None
