"""A student as ComfyUI's MODEL: its header, its family, and the meaning of its sigmas."""

from __future__ import annotations

from pathlib import Path

import comfy.model_patcher
import comfy.model_sampling

from .. import schedules, weights
from ..header import StudentHeader, read_header
from ..schedules import Levels

_ATTACHMENT = "dpdmd"  # the header's name in a model; attachments survive clones and LoRAs
# ComfyUI's class of a model -> the header's word
_FAMILIES = {
    "SD3": "sd3",
    "SDXL": "sdxl",
    "Sana": "sana",
    "Lumina2": "z_image",
    "QwenImage": "qwen_image",
    "Flux2": "flux2_klein",
}


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The header's word for a model's family; ComfyUI's class name for other families."""
    if model.model.model_config.unet_config.get("z_image_modulation"):  # ComfyUI's class of it is Lumina2's
        return "z_image"
    name = type(model.model).__name__
    return _FAMILIES.get(name, name)


def is_of_family(model: comfy.model_patcher.ModelPatcher, header: StudentHeader) -> bool:
    """True unless the header names another family than the model's; families that only ComfyUI knows have no word."""
    family = family_of(model)
    return header.family == family or not {header.family, family} & {*_FAMILIES.values(), "z_image"}


def levels_of(model: comfy.model_patcher.ModelPatcher) -> Levels:
    """The noise levels of a model.

    Raises:
        ValueError: unless it is a flow model, or predicts eps or v on a table of 1000 timesteps.
    """
    model_sampling = model.get_model_object("model_sampling")
    kind, rules = type(model_sampling), comfy.model_sampling
    if kind.calculate_denoised is rules.CONST.calculate_denoised:
        # SD3 has timesteps of 0 to 1000. Flow families with other timesteps have no published few-step schedule
        return Levels("flow", None, published=getattr(model_sampling, "multiplier", None) == 1000)
    has_table = isinstance(model_sampling, rules.ModelSamplingDiscrete) and len(model_sampling.sigmas) == 1000
    if has_table and kind.timestep is rules.ModelSamplingDiscrete.timestep:
        for prediction, rule in (("eps", rules.EPS), ("v", rules.V_PREDICTION)):
            if kind.calculate_denoised is rule.calculate_denoised:
                return Levels(prediction, model_sampling.sigmas, published=prediction == "eps")
    raise ValueError(
        f"the model is sampled by {' + '.join(base.__name__ for base in kind.__bases__)}, DP-DMD students by flow, eps "
        "or v on 1000 timesteps: remove the model-sampling node, or connect an SD3.5 or SDXL model"
    )


def header_of(model: comfy.model_patcher.ModelPatcher) -> StudentHeader | None:
    """The header that Load DP-DMD Student attached to a model, or that is in the file of ComfyUI's own loader.

    ComfyUI's loaders leave their arguments on the model, the file's path first; versions before 0.33 do not.
    """
    if _ATTACHMENT in model.attachments:
        return model.get_attachment(_ATTACHMENT)
    _loader, arguments = (getattr(model, "cached_patcher_init", None) or (None, ()))[:2]
    path = next(iter(arguments), None)
    if not isinstance(path, str) or not Path(path).is_file():
        return None
    name = Path(path).name
    return read_header(weights.read_metadata(path, name), name)


def with_header(
    model: comfy.model_patcher.ModelPatcher, header: StudentHeader | None
) -> comfy.model_patcher.ModelPatcher:
    """A clone of the model with the header attached, set to the header's prediction.

    Without a header the result has none either: a LoRA does not inherit the levels of its base model.
    ComfyUI cannot tell from the weights that a network predicts v.

    Raises:
        ValueError: if the header's levels do not fit the model.
    """
    if header is None and header_of(model) is None:
        return model
    model = model.clone()
    model.set_attachments(_ATTACHMENT, header)
    if header is None:
        return model
    if header.prediction == "v" and levels_of(model).prediction == "eps":
        model.add_object_patch("model_sampling", _VPrediction(model.model.model_config))
    schedules.trained_sigmas(header, levels_of(model))  # fail here, not later in the sampler
    return model


class _VPrediction(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    pass
