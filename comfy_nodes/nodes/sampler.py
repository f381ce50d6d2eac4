"""DP-DMD Sampler: the one node that most workflows need."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io
from torch import Tensor

from .. import sampling, schedules
from ..header import StudentHeader
from ..noise import BatchStream, ImageStreams, image_seeds
from ..schedules import Levels
from .model import header_of, levels_of
from .schema import denoise_input, method_input, per_image_seed_input, schema, seed_input, show_text, steps_input


class DPDMDSampler(io.ComfyNode):
    """Samples a student on its trained levels: one network call per step, one seed per picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDSampler",
            aliases=["few step", "few-step", "4 steps", "turbo", "lightning", "distilled", "DMD2"],
            display_name="DP-DMD Sampler",
            description="Samples a few-step DP-DMD student on the noise levels it was trained on, without guidance "
            "(exactly one network call per step). Each picture of a batch has its own seed.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The student. Load DP-DMD Student keeps its trained schedule; without one, connect the "
                    "sigmas of DP-DMD Scheduler.",
                ),
                io.Conditioning.Input("positive", tooltip="The prompt."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="An empty latent for text-to-image; an encoded picture with denoise < 1 for "
                    "image-to-image.",
                ),
                seed_input("seed"),
                steps_input(
                    "0: as many as the student was trained for. Fewer steps use some of its levels; 1 is a draft that "
                    "shows the composition of the full run with the same seed."
                ),
                denoise_input(),
                *_sampling_inputs(),
            ],
            outputs=[
                io.Latent.Output("latent", display_name="latent", tooltip="The finished latents."),
                io.String.Output("info", display_name="info", tooltip="Levels and method of the run; warnings first."),
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed, steps, denoise, method, per_image_seed, sigmas=None, negative=None
    ) -> io.NodeOutput:
        levels, header = levels_of(model), header_of(model)
        sigmas, source = _choose_sigmas(sigmas, steps, denoise, levels, header)
        method = choose_method(method, levels, header)
        conds = conditions(model, positive, negative)
        latent = fit_latent(latent_image, model)
        info = f"{len(sigmas) - 1} steps, {method}: {schedules.format_sigmas(sigmas)} ({source})"
        if header is None:
            info = f"{schedules.warning_without_header(levels)}\n{info}"
        show_text(info, cls.hidden.unique_id)
        guider = unguided(prepare_pictures(model) if per_image_seed else model, conds)
        denoised = draw(guider, latent, seed, method, per_image_seed, sigmas)
        return io.NodeOutput(latent | {"samples": as_intermediate(denoised)}, info)


def _sampling_inputs() -> list[io.Input]:
    return [
        method_input(),
        per_image_seed_input(),
        io.Sigmas.Input(
            "sigmas", optional=True, tooltip="Your own noise levels, falling to 0. They replace steps and denoise."
        ),
        io.Conditioning.Input(
            "negative",
            optional=True,
            tooltip="Only for patches that compare with a negative prompt, such as Normalized Attention Guidance; they "
            "take a second network call per step. Without such a patch it is not used.",
        ),
    ]


def _choose_sigmas(
    sigmas: Tensor | None, steps: int, denoise: float, levels: Levels, header: StudentHeader | None
) -> tuple[Tensor, str]:
    if sigmas is not None:
        return schedules.check_sigmas(sigmas.float(), levels), "connected"
    sigmas, source = schedules.sigmas_for(schedules.AUTO, steps, levels, header, custom="")
    return schedules.last_steps(sigmas, denoise), source


def choose_method(method: str, levels: Levels, header: StudentHeader | None) -> str:
    """The sampling method behind the menu's `auto`: the header's, else the family's usual one."""
    if method != sampling.AUTO:
        return method
    if header is not None:
        return sampling.RENOISE if header.sampler == "renoise" else sampling.DETERMINISTIC
    return sampling.DETERMINISTIC if levels.prediction == "flow" else sampling.RENOISE


def conditions(model: comfy.model_patcher.ModelPatcher, positive: list, negative: list | None) -> dict[str, list]:
    """Prompts of a guider. A negative one is evaluated only if a patch asks ComfyUI for it.

    Raises:
        ValueError: if a patch asks for a negative prompt and there is none; it would crash, or do nothing.
    """
    if negative is not None:
        return {"positive": positive, "negative": negative}
    if model.model_options.get("disable_cfg1_optimization"):
        raise ValueError(
            "a patch on this model compares with a negative prompt (Normalized Attention Guidance, Self-Attention "
            "Guidance): connect one to negative, or remove the patch"
        )
    return {"positive": positive}


def unguided(model: comfy.model_patcher.ModelPatcher, conds: dict[str, list]) -> comfy.samplers.CFGGuider:
    """A guider with one network call per step, unless a patch asks for the negative prompt."""
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds(conds)
    guider.set_cfg(1.0)
    return guider


def prepare_pictures(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose pictures do not depend on their batch on a CPU; see `picture_by_picture`."""
    if model.load_device.type != "cpu":
        return model
    model = model.clone()
    model.model_options = picture_by_picture(model.model_options)
    return model


def draw(
    guider: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    method: str,
    per_image_seed: bool,
    sigmas: Tensor,
    *,
    calls: int | None = None,
    preview: bool = True,
) -> Tensor:
    """Latents [B, C, H, W] of a LATENT, sampled with progress.

    Args:
        seed: of picture 0.
        method: deterministic or re-noise.
        per_image_seed: draw the noise per picture, not per batch.
        calls: steps to show as progress; those of `sigmas` if None.
        preview: show the picture of every step in the node.
    """
    samples = latent["samples"]
    batch = (len(samples), latent.get("batch_index"))
    start, fresh = (
        ImageStreams(image_seeds(seed, *batch)) if per_image_seed else BatchStream(seed, *batch) for _ in range(2)
    )
    noise, steps = start.draw(samples.shape[1:]), calls or len(sigmas) - 1
    return guider.sample(
        noise if per_image_seed else noise.to(samples.dtype),  # KSampler rounds its noise
        samples,
        sampler_object(method, fresh),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(guider.model_patcher, steps) if preview else _progress(steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def _progress(steps: int) -> Callable[..., None]:
    bar = comfy.utils.ProgressBar(steps)

    def show(step: int, _x0: Tensor, _x: Tensor, total_steps: int) -> None:
        bar.update_absolute(step + 1, total_steps)

    return show


def as_intermediate(samples: Tensor) -> Tensor:
    """Samples on the device and in the precision that ComfyUI keeps between nodes."""
    management = comfy.model_management
    dtype = management.intermediate_dtype() if hasattr(management, "intermediate_dtype") else torch.float32
    return samples.to(management.intermediate_device(), dtype)


def sampler_object(method: str, streams: ImageStreams | BatchStream | None = None) -> comfy.samplers.Sampler:
    """A SAMPLER: ComfyUI's Euler, which is DDIM with eta 0 for eps and v; or our x0 sampler with fresh noise."""
    if method == sampling.DETERMINISTIC:
        return comfy.samplers.sampler_object("euler")
    return comfy.samplers.KSAMPLER(sampling.sample_renoise, extra_options={"streams": streams})


def fit_latent(latent_image: dict, model: comfy.model_patcher.ModelPatcher) -> dict:
    """A copy of a LATENT in the model's shape [B, C, H, W]; an empty latent gets the model's channels.

    Raises:
        ValueError: if it comes from another family's VAE, or is no picture.
    """
    latent = dict(latent_image)
    accepted = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters  # differs between versions
    ratios = {name: latent.pop(name, None) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    latent["samples"] = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{name: value for name, value in ratios.items() if name in accepted}
    )
    latent_format = model.get_model_object("latent_format")
    shape, channels = tuple(latent["samples"].shape), latent_format.latent_channels
    is_picture = len(shape) == 2 + latent_format.latent_dimensions  # a third dimension has one frame per picture
    if latent["samples"].is_nested or not is_picture or shape[1] != channels:
        raise ValueError(
            f"latent_image has shape {list(shape)}, this model needs [pictures, {channels}, height, width]: "
            "encode the picture with this model's VAE"
        )
    return latent


def picture_by_picture(model_options: dict) -> dict:
    """Model options under which the network sees one picture at a time.

    On a CPU a picture of a batch then equals the picture alone bit for bit: BLAS multiplies one row in another order
    than several. On a CPU it costs no time. A batch stays whole where a part of it may hold one value per picture: a
    ControlNet, a wrapper, an attention patch.
    """
    if "model_function_wrapper" in model_options:
        return model_options
    options = comfy.model_patcher.create_model_options_clone(model_options)

    def call(apply_model, arguments: dict) -> Tensor:
        return torch.cat([apply_model(one["input"], one["timestep"], **one["c"]) for one in _split_call(arguments)])

    options["model_function_wrapper"] = call
    return options


def _split_call(arguments: dict) -> list[dict]:
    """Split a network call into calls with one picture each; keep it whole if an argument cannot be split."""
    count, kinds = len(arguments["input"]), arguments["cond_or_uncond"]
    options = arguments["c"].get("transformer_options", {})
    values = {name: value for name, value in arguments["c"].items() if name != "transformer_options"}
    shared = {name: value for name, value in values.items() if isinstance(value, int)}  # such as a number of tokens
    tensors = {name: value for name, value in values.items() if name not in shared}
    is_patched = any(options.get(name) for name in ("patches", "patches_replace")) or any(
        options.get("wrappers", {}).values()
    )
    if is_patched or not all(isinstance(value, Tensor) and len(value) == count for value in tensors.values()):
        return [arguments]
    calls = []
    for index in range(count):
        row, kind = slice(index, index + 1), [kinds[index * len(kinds) // count]]
        calls.append(
            {
                "input": arguments["input"][row],
                "timestep": arguments["timestep"][row],
                "c": {name: value[row] for name, value in tensors.items()}
                | shared
                | {"transformer_options": options | {"cond_or_uncond": kind}},
                "cond_or_uncond": kind,
            }
        )
    return calls
