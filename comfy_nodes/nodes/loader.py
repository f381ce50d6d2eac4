"""Load DP-DMD Student: a full student or a LoRA, refused unless its file fits completely."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io
from torch import Tensor

from .. import lora, schedules, weights
from ..header import StudentHeader, read_header
from ..schedules import Levels
from .model import family_of, is_of_family, levels_of, with_header
from .schema import schema, show_text

# ComfyUI's class of a model -> its own table of diffusers' keys; older versions lack some
_DIFFUSERS_KEYS = {
    "SD3": "mmdit_to_diffusers",
    "SDXL": "unet_to_diffusers",
    "Flux": "flux_to_diffusers",
    "AuraFlow": "auraflow_to_diffusers",
    "PixArt": "pixart_to_diffusers",
    "Lumina2": "z_image_to_diffusers",
}
_LATER = {"flux2_klein": "Flux2", "qwen_image": "QwenImage", "z_image": "ZImage"}  # classes that older versions lack
_FP8_MARK, _SCALES_WITH_DEFAULT = "scaled_fp8", (".scale_weight", ".scale_input")  # of ComfyUI's first fp8 format


class DPDMDLoader(io.ComfyNode):
    """Loads a student with its trained schedule."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDLoader",
            aliases=["few step", "turbo", "lightning", "distilled", "DMD2", "few-step LoRA"],
            display_name="Load DP-DMD Student",
            description="Loads a full student (diffusers or ComfyUI keys, .safetensors or a released .pt) or a LoRA "
            "student, and keeps its trained schedule with the model. A file that does not fit completely is an error.",
            inputs=[
                io.Combo.Input(
                    "student_name",
                    options=_student_names(),
                    tooltip="Files of models/diffusion_models (full students) and models/loras (LoRA students). Files "
                    "with a DP-DMD header come first.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn"],
                    default="default",
                    tooltip="Precision of a full student's weights; fp8 halves the memory and changes the picture a "
                    "little. A LoRA uses its base model's precision.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Strength of a LoRA; 1 is the trained strength. A full student has none: leave it at 1.",
                ),
                io.Model.Input("base_model", optional=True, tooltip="Only for a LoRA: the model it was trained on."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The student, with its schedule."),
                io.String.Output("info", display_name="info", tooltip="What was loaded, and how it is sampled."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, student_name, **_others) -> str:
        """Changes with the file; ComfyUI's own loaders keep using a file that was replaced on disk."""
        path = _path_of(student_name)
        return f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, student_name, weight_dtype, strength, base_model=None) -> io.NodeOutput:
        path, name = str(_path_of(student_name)), weights.folder_and_file(student_name)[1]
        state, metadata = weights.load_state(path, name, comfy.utils.load_torch_file)
        header = read_header(metadata, name)
        if header and header.family in _LATER and not hasattr(comfy.supported_models, _LATER[header.family]):
            raise ValueError(
                f"{name} is a student of {header.family}, which this ComfyUI does not know: update ComfyUI"
            )
        is_lora = lora.is_lora(state) if header is None else header.kind == "lora"
        if is_lora:
            if weight_dtype != "default":
                raise ValueError(f"weight_dtype is {weight_dtype}, but {name} is a LoRA: choose it at the base model")
            model, summary = _load_lora(base_model, state, header, strength, name)
        else:
            if strength != 1:
                raise ValueError(f"strength is {strength:g}, but {name} is a full student: set it to 1")
            model, summary = _load_full(path, state, metadata, header, weight_dtype, name)
        model = with_header(model, header)
        info = "\n".join([summary, *_describe(header, levels_of(model))])
        show_text(info, cls.hidden.unique_id)
        return io.NodeOutput(model, info)


def _student_names() -> list[str]:
    """All files that may be students, those with a DP-DMD header first."""
    files = [(folder, name) for folder in weights.FOLDERS for name in folder_paths.get_filename_list(folder)]
    files.sort(key=lambda file: not weights.looks_like_student(folder_paths.get_full_path(*file)))
    return [f"{folder}/{name}" for folder, name in files]


def _path_of(student_name: str) -> Path:
    folder, name = weights.folder_and_file(student_name)
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise FileNotFoundError(f"student_name: {name} is not in models/{folder}: put the file there and refresh")
    return Path(path)


def _describe(header: StudentHeader | None, levels: Levels) -> list[str]:
    if header is None:
        return [schedules.warning_without_header(levels), schedules.advice_without_header(levels)]
    sigmas = schedules.format_sigmas(schedules.trained_sigmas(header, levels))
    return [f"{header.prediction}, {header.sampler}, {header.steps} steps", f"levels {sigmas}"]


# ---- full students


def _load_full(
    path: str, state: dict, metadata: dict | None, header: StudentHeader | None, weight_dtype: str, name: str
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """The model, and a line that says so."""
    options = {} if weight_dtype == "default" else {"dtype": getattr(torch, weight_dtype.replace("fp8", "float8"))}
    state = _network_state(state, metadata, name)
    shapes = {key: torch.empty_like(value, device="meta") for key, value in state.items()}  # loading empties the state
    model = _make_model(state, metadata, options, name)
    if hasattr(model, "cached_patcher_init"):  # newer versions make a second copy with it, for a second GPU
        model.cached_patcher_init = (_load_again, (path, options, name))
    family = family_of(model)
    if header is not None and not is_of_family(model, header):
        raise ValueError(f"{name}: the header says {header.family}, the weights are {family}: export the student again")
    _check_complete(model, shapes, name)
    return model, f"{name}: full {family} student, {len(shapes)} of {len(shapes)} keys"


def _load_again(path: str, options: dict, name: str, **kwargs: Any) -> comfy.model_patcher.ModelPatcher:
    state, metadata = weights.load_state(path, name, comfy.utils.load_torch_file)
    return _make_model(_network_state(state, metadata, name), metadata, options, name, **kwargs)


def _network_state(state: dict[str, Tensor], metadata: dict[str, str] | None, name: str) -> dict[str, Tensor]:
    """The network's own keys, with quantised layers marked in the state, as ComfyUI keeps them.

    Marks in the metadata name layers by their keys in the file, so they are moved before prefixes are removed.

    Raises:
        ValueError: if the marks in the metadata are not ComfyUI's.
    """
    convert = getattr(comfy.utils, "convert_old_quants", lambda state, _prefix, metadata: (state, metadata))
    try:
        state, _ = convert(state, "", metadata)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{name}: _quantization_metadata is not ComfyUI's ({weights.first_line(error)}): quantise it again"
        ) from None
    state, _ = convert(weights.without_wrappers(state), "", {})
    return state


def _make_model(
    state: dict[str, Tensor], metadata: dict[str, str] | None, options: dict, name: str, **kwargs: Any
) -> comfy.model_patcher.ModelPatcher:
    first_keys = weights.first_three(sorted(state))
    if "metadata" in inspect.signature(comfy.sd.load_diffusion_model_state_dict).parameters:  # newer versions
        kwargs["metadata"] = {key: value for key, value in (metadata or {}).items() if key != "_quantization_metadata"}
    try:
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options, **kwargs)
    except (RuntimeError, ValueError, LookupError) as error:  # LookupError: an unknown quantised format
        raise ValueError(f"{name} does not fit its network ({weights.first_line(error)}): export it again") from error
    if model is None:
        raise ValueError(f"{name} is no network that ComfyUI knows (keys {first_keys}): export the student again")
    return model


def _check_complete(model: comfy.model_patcher.ModelPatcher, shapes: dict[str, Tensor], name: str) -> None:
    """Refuse a file that lacks keys or has others, in its own spelling: ComfyUI's, the model's authors' or diffusers'.

    Args:
        model: the loaded model.
        shapes: the file's tensors, without their values.
        name: of the file, for messages.
    """
    keys = set(shapes)
    network = {
        key for key in model.model.diffusion_model.state_dict() if key in keys or not key.endswith(_SCALES_WITH_DEFAULT)
    }
    renamed = set(model.model.model_config.process_unet_state_dict(dict(shapes))) - {_FP8_MARK}
    diffusers = _diffusers_keys(model, network, keys)
    if len(keys & diffusers) > len(renamed & network):
        weights.check_keys(keys, diffusers, name)
    else:
        weights.check_keys(renamed, network, name)


def _diffusers_keys(model: comfy.model_patcher.ModelPatcher, network: set[str], keys: set[str]) -> set[str]:
    """All keys of a complete file in diffusers' spelling; none for a family that ComfyUI reads in its own only."""
    table = getattr(comfy.utils, _DIFFUSERS_KEYS.get(type(model.model).__name__, ""), None)
    if table is None:
        return set()
    aliases: dict[tuple, list[str]] = {}  # (a weight of the network, its slice or None) -> its diffusers keys
    for key, target in table(model.model.model_config.unet_config).items():
        weight, cut = (target, None) if isinstance(target, str) else target[:2]
        if weight in network:
            aliases.setdefault((weight, cut), []).append(key)
    # a file has one of the keys for the same thing, and a weight in slices or as a whole
    keys_of = {target: next((key for key in names if key in keys), names[0]) for target, names in aliases.items()}
    whole = {weight for (weight, cut), key in keys_of.items() if cut is None and key in keys}
    sliced = {weight for weight, cut in keys_of if cut is not None} - whole
    return {key for (weight, cut), key in keys_of.items() if (cut is not None) == (weight in sliced)}


# ---- LoRA students


def _load_lora(
    base_model: comfy.model_patcher.ModelPatcher | None,
    state: dict,
    header: StudentHeader | None,
    strength: float,
    name: str,
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    """The patched base model, and a line that says so."""
    if base_model is None:
        raise ValueError(f"{name} is a LoRA: connect the model it was trained on to base_model")
    family = family_of(base_model)
    if header is not None and not is_of_family(base_model, header):
        raise ValueError(
            f"{name} is a LoRA for {header.family}, base_model is {family}: connect the {header.family} model"
        )
    modules = lora.lora_modules(state, family, name)
    targets = comfy.lora.model_lora_keys_unet(base_model.model, {})
    shapes = {module: _target_shape(base_model, targets[module]) for module in modules if module in targets}
    lora.check_lora(modules, shapes, name)
    modules = lora.with_alphas(modules, header, name)
    tensors = {
        f"{module}.{part}" if part == "alpha" else f"{module}.{part}.weight": tensor
        for module, parts in modules.items()
        for part, tensor in parts.items()
    }
    model = base_model.clone()
    patched = model.add_patches(comfy.lora.load_lora(tensors, targets, log_missing=False), strength)
    if len(patched) != len(modules):
        raise ValueError(f"{name}: ComfyUI took {len(patched)} of {len(modules)} modules: export it again")
    return model, f"{name}: {family} LoRA at strength {strength:g}, {len(patched)} of {len(modules)} modules"


def _target_shape(base_model: comfy.model_patcher.ModelPatcher, target: str | tuple) -> tuple[int, ...]:
    """Shape of the weight that a LoRA's module changes, or of its slice of a joint weight.

    The parameter's own shape: a state dict holds the packed bytes of quantised weights (GGUF, NVFP4).
    """
    key, cut = (target, None) if isinstance(target, str) else target[:2]
    shape = list(comfy.utils.get_attr(base_model.model, key).shape)
    if cut is not None:
        axis, _start, length = cut
        shape[axis] = length
    return tuple(shape)
