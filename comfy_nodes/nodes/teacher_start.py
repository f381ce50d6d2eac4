"""Teacher Start: the base model takes steps of its own to one of the few-step model's levels; that model finishes."""

from __future__ import annotations

from typing import Any

import comfy.samplers
from comfy_api.latest import io
from torch import Tensor

from .. import schedules
from ..schedules import MAX_STEPS
from ..starts import join_levels
from .model import header_of, levels_of
from .sampler import as_intermediate, choose_method, conditions, draw, fit_latent, prepare_pictures
from .schema import method_input, per_image_seed_input, schema, seed_input, show_text
from .teacher_first import TeacherFirstGuider, check_models

MAX_TEACHER_STEPS = 100
SEARCH = ["variety", "diversity", "seed variation", "seeds look alike", "turbo", "lightning", "4 steps"]
# Keys of ComfyUI's network configs that hold the widths of text embeddings
_TEXT_WIDTHS = (
    "adm_in_channels",
    "cap_feat_dim",
    "caption_channels",
    "cond_seq_dim",
    "context_dim",
    "context_embedder_config",
    "context_in_dim",
    "joint_attention_dim",
    "text_dim",
    "vec_in_dim",
)


class DPDMDTeacherStart(io.ComfyNode):
    """Samples with two models: variety from the base model, speed from the few-step model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDTeacherStart",
            display_name="Teacher Start",
            description="More variety for any few-step model (Turbo, Lightning, DMD2, LCM), without training: the base "
            "model draws the first part of the picture, the few-step model the rest. Different seeds then give "
            "different pictures.",
            aliases=SEARCH,
            hidden=[io.Hidden.unique_id],
            inputs=[
                *model_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent; its batch size is the number of pictures."),
                seed_input("seed"),
                *start_inputs(),
                method_input(),
                per_image_seed_input(),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="The few-step model's own noise levels, for example of Basic Scheduler with as many steps "
                    "as it needs. Not needed if its file has a DP-DMD header.",
                ),
                negative_input(),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The finished latents.")],
        )

    @classmethod
    def execute(
        cls,
        base_model,
        few_step_model,
        positive,
        latent_image,
        seed,
        teacher_steps,
        landing,
        teacher_cfg,
        method,
        per_image_seed,
        sigmas=None,
        negative=None,
    ) -> io.NodeOutput:
        models = [prepare_pictures(model) if per_image_seed else model for model in (base_model, few_step_model)]
        guider = make_guider(*models, positive, negative, teacher_steps=teacher_steps, landing=landing, cfg=teacher_cfg)
        levels, header = levels_of(few_step_model), header_of(few_step_model)
        if sigmas is None:
            sigmas = schedules.sigmas_for(schedules.AUTO, 0, levels, header, custom="")[0]
        method = choose_method(method, levels, header)
        joined = guider.join(sigmas.float())
        show_text(f"{describe(joined, teacher_steps)}, {method}", cls.hidden.unique_id)
        latent = fit_latent(latent_image, few_step_model)
        denoised = draw(guider, latent, seed, method, per_image_seed, sigmas.float(), calls=len(joined) - 1)
        return io.NodeOutput(latent | {"samples": as_intermediate(denoised)})


class DPDMDTeacherStartGuider(io.ComfyNode):
    """A GUIDER with the teacher start, for ComfyUI's own advanced sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDTeacherStartGuider",
            display_name="Teacher Start Guider",
            description="Teacher Start for SamplerCustomAdvanced: connect the few-step model's sigmas and sampler "
            "there. The base model takes Euler steps of its own to one of these levels; the sampler goes on from it.",
            aliases=SEARCH,
            inputs=[*model_inputs(), *start_inputs(), negative_input()],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, base_model, few_step_model, positive, teacher_steps, landing, teacher_cfg, negative=None
    ) -> io.NodeOutput:
        return io.NodeOutput(
            make_guider(
                base_model,
                few_step_model,
                positive,
                negative,
                teacher_steps=teacher_steps,
                landing=landing,
                cfg=teacher_cfg,
            )
        )


# ---- inputs that the nodes share


def model_inputs() -> list[io.Input]:
    """Inputs for both models and the prompt."""
    return [
        io.Model.Input(
            "base_model",
            tooltip="The model that the few-step model was distilled from, with all its steps: Z-Image for "
            "Z-Image-Turbo, SDXL for an SDXL with DMD2 or Lightning.",
        ),
        io.Model.Input(
            "few_step_model",
            tooltip="The few-step model, or the base model with a few-step LoRA. It draws the details.",
        ),
        io.Conditioning.Input("positive", tooltip="The prompt, for both models."),
    ]


def start_inputs() -> list[io.Input]:
    """Inputs that say how the base model starts."""
    return [
        io.Int.Input(
            "teacher_steps",
            default=3,
            min=1,
            max=MAX_TEACHER_STEPS,
            tooltip="Steps of the base model. More give more variety; each is one network call, or two with guidance.",
        ),
        io.Int.Input(
            "landing",
            default=1,
            min=1,
            max=MAX_STEPS - 1,
            tooltip="Number of the few-step model's first steps that the base model replaces. 2 gives more variety "
            "than 1; the few-step model must keep one step.",
        ),
        io.Float.Input(
            "teacher_cfg",
            default=3.5,
            min=1.0,
            max=30.0,
            step=0.1,
            tooltip="Guidance scale of the base model. 1: no guidance, half the cost, and no negative prompt needed. "
            "FLUX.1-dev takes 1, its guidance comes from FluxGuidance.",
        ),
    ]


def negative_input() -> io.Input:
    """Input for the negative prompt, which teacher_cfg 1 does not need."""
    return io.Conditioning.Input(
        "negative", optional=True, tooltip="The negative prompt of the base model; needed if teacher_cfg is not 1."
    )


# ---- the guider


class TeacherStartGuider(TeacherFirstGuider):
    """Takes Euler steps with the teacher on its own levels, then hands the student to the connected sampler."""

    def __init__(self, teacher: Any, student: Any, teacher_steps: int, landing: int) -> None:
        super().__init__(teacher, student, teacher_steps)
        self.landing = landing

    def join(self, sigmas: Tensor) -> Tensor:
        """Levels of the whole run for a student on `sigmas`; see `join_levels`."""
        levels = levels_of(self.student.model_patcher)
        return join_levels(schedules.check_sigmas(sigmas, levels), self.landing, self.teacher_steps, levels)

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, *args, **kwargs) -> Tensor:
        return super().inner_sample(
            noise, latent_image, device, _after_euler(sampler, self.teacher_steps), self.join(sigmas), *args, **kwargs
        )


def make_guider(
    base_model: Any,
    few_step_model: Any,
    positive: list,
    negative: list | None,
    *,
    teacher_steps: int,
    landing: int,
    cfg: float,
) -> TeacherStartGuider:
    """The guider of a teacher start.

    Raises:
        ValueError: if the models do not belong together, or guidance has no negative prompt.
    """
    _check_pair(base_model, few_step_model)
    if cfg != 1 and negative is None:
        raise ValueError(
            f"teacher_cfg is {cfg:g} without a negative prompt: connect one to negative, or set teacher_cfg to 1"
        )
    guider = TeacherStartGuider(base_model, few_step_model, teacher_steps, landing)
    guider.inner_set_conds(conditions(few_step_model, positive, negative))
    guider.set_cfg(cfg)
    return guider


def describe(joined: Tensor, teacher_steps: int) -> str:
    """A run's levels by model, for the text in a node."""
    teacher, student = joined[: teacher_steps + 1], joined[teacher_steps:]
    return (
        f"base model, {teacher_steps} steps: {schedules.format_sigmas(teacher)}; "
        f"few-step model, {len(student) - 1} steps: {schedules.format_sigmas(student)}"
    )


def _check_pair(base_model: Any, few_step_model: Any) -> None:
    if few_step_model.is_clone(base_model) and few_step_model.patches_uuid == base_model.patches_uuid:
        raise ValueError(
            "few_step_model and base_model are the same weights: put the few-step LoRA between them, or connect the "
            "few-step model"
        )
    if header_of(base_model) is not None:
        raise ValueError(
            f"base_model is a student of {header_of(base_model).steps} steps: connect it to few_step_model, and the "
            "model it was distilled from here"
        )
    check_models(few_step_model, base_model, names=("few_step_model", "base_model"))
    base, few_step = (_text_widths(model) for model in (base_model, few_step_model))
    if base != few_step:
        raise ValueError(
            f"base_model and few_step_model read different text encoders ({base} and {few_step}): connect the model "
            "that the few-step model was distilled from"
        )


def _text_widths(model: Any) -> dict[str, Any]:
    config = model.model.model_config.unet_config
    return {key: config[key] for key in _TEXT_WIDTHS if config.get(key) is not None}


def _after_euler(sampler: comfy.samplers.Sampler, steps: int) -> comfy.samplers.Sampler:
    """A sampler whose first steps are Euler's."""
    if not isinstance(sampler, comfy.samplers.KSAMPLER):
        raise ValueError(
            f"the sampler {type(sampler).__name__} cannot begin in the middle of a picture: use KSamplerSelect or "
            "DP-DMD Sampler Select"
        )
    euler = comfy.samplers.sampler_object("euler").sampler_function

    def sample(model, x, sigmas, extra_args=None, callback=None, disable=None, **options) -> Tensor:
        def later(step: dict) -> None:
            callback(step | {"i": step["i"] + steps})

        x = euler(model, x, sigmas[: steps + 1], extra_args=extra_args, callback=callback, disable=disable)
        return sampler.sampler_function(
            model, x, sigmas[steps:], extra_args=extra_args, callback=callback and later, disable=disable, **options
        )

    return comfy.samplers.KSAMPLER(sample, sampler.extra_options, sampler.inpaint_options)
