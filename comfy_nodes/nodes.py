"""The nodes: what ComfyUI shows and calls. Everything that can be told without ComfyUI is in the modules beside."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any, NamedTuple

import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils
import folder_paths
import latent_preview
import torch
from comfy_api.latest import ComfyExtension, io
from server import PromptServer
from torch import Tensor

from . import sampling, schedules, weights
from .noise import BatchStream, ImageStreams, PerImageNoise, image_seeds
from .schedules import Levels
from .weights import StudentHeader

CATEGORY = "DP-DMD"
ATTACHMENT = "dpdmd"  # under which a model carries its header; it survives clones and LoRAs
_MAX_SEED = 2**64 - 1
_FAMILIES = {"SD3": "sd3", "SDXL": "sdxl"}  # ComfyUI's class of a model -> the header's word


def schema(**fields: Any) -> io.Schema:
    """A schema of this category; what older versions of ComfyUI do not know is left out."""
    known = io.Schema.__dataclass_fields__
    aliases = {"search_aliases": ["DP-DMD", "DPDMD", "DMD2", "distilled", "few step"]}
    return io.Schema(category=CATEGORY, **{key: value for key, value in aliases.items() if key in known}, **fields)


def levels_of(model: comfy.model_patcher.ModelPatcher) -> Levels:
    """What the sigmas of a MODEL mean.

    Raises:
        ValueError: unless it is a flow model, or predicts eps or v on a table of 1000 timesteps.
    """
    model_sampling = model.get_model_object("model_sampling")
    kind, rules = type(model_sampling), comfy.model_sampling
    if kind.calculate_denoised is rules.CONST.calculate_denoised:
        # timesteps of 0 to 1000, as SD3's: other flow families count otherwise, and no schedule is published for them
        return Levels("flow", None, published=getattr(model_sampling, "multiplier", None) == 1000)
    by_table = isinstance(model_sampling, rules.ModelSamplingDiscrete) and len(model_sampling.sigmas) == 1000
    if by_table and kind.timestep is rules.ModelSamplingDiscrete.timestep:
        for prediction, rule in (("eps", rules.EPS), ("v", rules.V_PREDICTION)):
            if kind.calculate_denoised is rule.calculate_denoised:
                return Levels(prediction, model_sampling.sigmas, published=prediction == "eps")
    raise ValueError(
        f"the model is sampled by {' + '.join(base.__name__ for base in kind.__bases__)}, DP-DMD students by flow, eps "
        "or v on 1000 timesteps: remove the model-sampling node, or connect an SD3.5 or SDXL model"
    )


def header_of(model: comfy.model_patcher.ModelPatcher) -> StudentHeader | None:
    """The header that Load DP-DMD Student left at a MODEL."""
    return model.get_attachment(ATTACHMENT)


def family_of(model: comfy.model_patcher.ModelPatcher) -> str:
    """The header's word for a MODEL's family; ComfyUI's own for families that have none."""
    name = type(model.model).__name__
    return _FAMILIES.get(name, name)


def say(text: str, node_id: str | None) -> None:
    """Show a line in the node, and in the terminal."""
    logging.info("DP-DMD: %s", text)
    if node_id is not None:
        PromptServer.instance.send_progress_text(text, node_id)


# ---- sampling


class DPDMDSampler(io.ComfyNode):
    """The one node that most workflows need."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDSampler",
            display_name="DP-DMD Sampler",
            description="Samples a few-step DP-DMD student on the noise levels it was trained on, without guidance "
            "(exactly one network call per step). Each picture of a batch has its own seed.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The student, best from Load DP-DMD Student: it knows its schedule."),
                io.Conditioning.Input("positive", tooltip="The prompt. Students take no negative prompt and no cfg."),
                io.Latent.Input(
                    "latent_image", tooltip="Empty for text-to-image; an encoded picture with denoise < 1."
                ),
                _seed_input("seed"),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=schedules.MAX_STEPS,
                    tooltip="As many as the student was trained for. Fewer use a part of its levels; 1 is a draft "
                    "that shows the composition of the full run with the same seed.",
                ),
                _denoise_input(),
                io.Combo.Input(
                    "method",
                    options=[sampling.AUTO, *sampling.METHODS],
                    default=sampling.AUTO,
                    tooltip="auto: what the student's file says; without a file's word, deterministic for flow models "
                    "(SD3.5) and re-noise for SDXL.",
                ),
                io.Boolean.Input(
                    "per_image_seed",
                    default=True,
                    tooltip="On: picture i of a batch is what seed + i gives alone. Off: the noise of KSampler, where "
                    "only the first picture can be made again alone.",
                ),
                io.Sigmas.Input(
                    "sigmas",
                    optional=True,
                    tooltip="Noise levels of your own, falling to 0. They replace steps and denoise.",
                ),
            ],
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="The finished latents.")],
        )

    @classmethod
    def execute(
        cls, model, positive, latent_image, seed, steps, denoise, method, per_image_seed, sigmas=None
    ) -> io.NodeOutput:
        levels, header = levels_of(model), header_of(model)
        sigmas, source = _chosen_sigmas(sigmas, steps, denoise, levels, header)
        method = _chosen_method(method, levels, header)
        latent = fitted(latent_image, model)
        samples = latent["samples"]
        say(f"{len(sigmas) - 1} steps, {method}: {schedules.in_words(sigmas)} ({source})", cls.hidden.unique_id)

        batch = (len(samples), latent.get("batch_index"))
        start, fresh = (
            ImageStreams(image_seeds(seed, *batch)) if per_image_seed else BatchStream(seed, *batch) for _ in range(2)
        )
        guider = comfy.samplers.CFGGuider(model)
        guider.inner_set_conds({"positive": positive})
        guider.set_cfg(1.0)  # with no negative, one network call per step
        if per_image_seed and model.load_device.type == "cpu":
            guider.model_options = picture_by_picture(model.model_options)
        denoised = guider.sample(
            start.draw(samples.shape[1:]).to(samples.dtype),
            samples,
            sampler_object(method, fresh),
            sigmas,
            denoise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, len(sigmas) - 1),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput(latent | {"samples": denoised.to(comfy.model_management.intermediate_device())})


def _seed_input(name: str) -> io.Int.Input:
    return io.Int.Input(
        name,
        default=0,
        min=0,
        max=_MAX_SEED,
        control_after_generate=True,
        tooltip="Seed of the first picture; picture i of a batch has seed + i. The same seed is the same picture.",
    )


def _denoise_input() -> io.Float.Input:
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.0,
        max=1.0,
        step=0.01,
        tooltip="Image-to-image: the share of the steps, from the end, that is run. The levels stay the trained ones: "
        "of 4 steps 0.75 runs the last 3, 0.5 the last 2. On the published SD3.5 schedule 0.25 changes almost nothing.",
    )


def _chosen_sigmas(
    sigmas: Tensor | None, steps: int, denoise: float, levels: Levels, header: StudentHeader | None
) -> tuple[Tensor, str]:
    if sigmas is not None:
        return schedules.checked(sigmas.float(), levels), "connected"
    sigmas, source = schedules.sigmas_for(schedules.AUTO, steps, levels, header, custom="")
    return schedules.last_part(sigmas, denoise), source


def _chosen_method(method: str, levels: Levels, header: StudentHeader | None) -> str:
    if method != sampling.AUTO:
        return method
    if header is not None:
        return sampling.RENOISE if header.sampler == "renoise" else sampling.DETERMINISTIC
    return sampling.DETERMINISTIC if levels.prediction == "flow" else sampling.RENOISE


def sampler_object(method: str, streams: ImageStreams | BatchStream | None = None) -> comfy.samplers.Sampler:
    """A SAMPLER: ComfyUI's Euler, which is DDIM with eta 0 for eps and v; or our x0 sampler with fresh noise."""
    if method == sampling.DETERMINISTIC:
        return comfy.samplers.sampler_object("euler")
    return comfy.samplers.KSAMPLER(sampling.sample_renoise, extra_options={"streams": streams})


def fitted(latent_image: dict, model: comfy.model_patcher.ModelPatcher) -> dict:
    """A copy of a LATENT in the model's shape [B, C, H, W]; an empty one gets the channels that the model needs.

    Raises:
        ValueError: if it was made by another family's VAE, or is no picture.
    """
    latent = dict(latent_image)
    known = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters  # grew over the versions
    sizes = {name: latent.pop(name, None) for name in ("downscale_ratio_spacial", "downscale_ratio_temporal")}
    latent["samples"] = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], **{name: value for name, value in sizes.items() if name in known}
    )
    shape, channels = tuple(latent["samples"].shape), model.get_model_object("latent_format").latent_channels
    if latent["samples"].is_nested or len(shape) != 4 or shape[1] != channels:
        raise ValueError(
            f"latent_image has shape {list(shape)}, this model needs [pictures, {channels}, height, width]: "
            "encode the picture with this model's VAE"
        )
    return latent


def picture_by_picture(model_options: dict) -> dict:
    """Model options under which the network sees one picture at a time.

    On a CPU a picture of a batch then equals the picture alone bit for bit: BLAS multiplies one row in another order
    than several. It costs nothing there. Batches with a ControlNet stay whole.
    """
    options = comfy.model_patcher.create_model_options_clone(model_options)
    before = options.get("model_function_wrapper")

    def call(apply_model, arguments: dict) -> Tensor:
        if before is not None:
            return torch.cat([before(apply_model, part) for part in _pictures(arguments)])
        return torch.cat([apply_model(part["input"], part["timestep"], **part["c"]) for part in _pictures(arguments)])

    options["model_function_wrapper"] = call
    return options


def _pictures(arguments: dict) -> list[dict]:
    """A call of the network as calls with one picture each; as it is, if it holds what cannot be divided."""
    count, kinds = len(arguments["input"]), arguments["cond_or_uncond"]
    options = arguments["c"].get("transformer_options", {})
    tensors = {name: value for name, value in arguments["c"].items() if name != "transformer_options"}
    if not all(isinstance(value, Tensor) and len(value) == count for value in tensors.values()):
        return [arguments]
    parts = []
    for index in range(count):
        one, kind = slice(index, index + 1), [kinds[index * len(kinds) // count]]
        parts.append(
            {
                "input": arguments["input"][one],
                "timestep": arguments["timestep"][one],
                "c": {name: value[one] for name, value in tensors.items()}
                | {"transformer_options": options | {"cond_or_uncond": kind}},
                "cond_or_uncond": kind,
            }
        )
    return parts


class DPDMDScheduler(io.ComfyNode):
    """The schedule alone, for SamplerCustomAdvanced and SplitSigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDScheduler",
            display_name="DP-DMD Scheduler",
            description="The noise levels that a DP-DMD student was trained on, as SIGMAS for ComfyUI's custom "
            "samplers. They do not depend on a shift that was patched into the model.",
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The student; its file's schedule comes with it."),
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=schedules.MAX_STEPS,
                    tooltip="Network calls before denoise is applied. Not used with custom.",
                ),
                _denoise_input(),
                io.Combo.Input(
                    "schedule",
                    options=list(schedules.NAMES),
                    default=schedules.AUTO,
                    tooltip="auto: the student's own, else the one published for its family. The official SD3.5 "
                    "schedule is the scheduler 'normal' of KSampler, the other two are its 'simple'.",
                ),
                io.String.Input(
                    "custom",
                    default="",
                    optional=True,
                    tooltip="For the schedule custom: falling sigmas that end at 0, like 1, 0.9, 0.75, 0.5, 0.",
                ),
            ],
            outputs=[io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="Falling noise levels, the last 0.")],
        )

    @classmethod
    def execute(cls, model, steps, denoise, schedule, custom="") -> io.NodeOutput:
        sigmas, source = schedules.sigmas_for(schedule, steps, levels_of(model), header_of(model), custom)
        sigmas = schedules.last_part(sigmas, denoise)
        say(f"{schedules.in_words(sigmas)} ({source})", cls.hidden.unique_id)
        return io.NodeOutput(sigmas)


class DPDMDSamplerSelect(io.ComfyNode):
    """The sampler alone, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDSamplerSelect",
            display_name="DP-DMD Sampler Select",
            description="The two ways to sample a student, for ComfyUI's custom samplers. Re-noise draws its fresh "
            "noise per picture and on the CPU: the same picture in every version and on every device.",
            inputs=[
                io.Combo.Input(
                    "method",
                    options=list(sampling.METHODS),
                    default=sampling.DETERMINISTIC,
                    tooltip="deterministic: Euler (DDIM with eta 0 for SDXL). re-noise: x0 plus fresh noise at every "
                    "step, as DMD2 samples; use it with Per-Image Noise, and do not split its schedule.",
                )
            ],
            outputs=[io.Sampler.Output("sampler", display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, method) -> io.NodeOutput:
        return io.NodeOutput(sampler_object(method))


class DPDMDNoise(io.ComfyNode):
    """Noise per picture, for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DPDMDNoise",
            display_name="Per-Image Noise",
            description="Noise that belongs to a picture: picture i of a batch gets what seed + i gives alone. Works "
            "with every model, and with Latent From Batch.",
            inputs=[_seed_input("noise_seed")],
            outputs=[io.Noise.Output("noise", display_name="noise", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise_seed) -> io.NodeOutput:
        return io.NodeOutput(PerImageNoise(noise_seed))


# ---- the teacher's first step


class _Start(NamedTuple):
    """What a run began with; the student's conditioning is made from it when its first step comes."""

    noise: Tensor
    latent_image: Tensor | None
    device: torch.device
    conditions: dict


class TeacherFirstGuider(comfy.samplers.CFGGuider):
    """Guides with the teacher down to a level, with the student from there on.

    The student is loaded when its first step comes. So teacher and student may be one model with and without a LoRA,
    and need not fit into memory together.
    """

    def __init__(self, teacher, student, teacher_steps: int) -> None:
        super().__init__(teacher)
        self.student, self.teacher_steps = student, teacher_steps
        self.lowest_of_teacher = 0.0  # sigma of the teacher's last step
        self.start: _Start | None = None
        self.conds_of_student: dict = {}
        self.options: dict = {}  # of the student, once it is loaded
        self.loaded: list | None = None  # what came with the student

    def outer_sample(self, *args, **kwargs) -> Tensor:
        try:
            return super().outer_sample(*args, **kwargs)
        finally:
            self._release()

    def inner_sample(self, noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs) -> Tensor:
        steps = len(sigmas) - 1
        if not 1 <= self.teacher_steps < steps:
            raise ValueError(f"teacher_steps is {self.teacher_steps} of {steps} steps: leave each model at least one")
        self.lowest_of_teacher = float(sigmas[self.teacher_steps - 1])
        self.conds_of_student = {"positive": [dict(cond) for cond in self.conds["positive"]]}
        more = {name: kwargs[name] for name in ("latent_shapes",) if name in kwargs}  # of newer ComfyUIs
        self.start = _Start(noise, latent_image, device, {"denoise_mask": denoise_mask, **more})
        return super().inner_sample(noise, latent_image, device, sampler, sigmas, denoise_mask, *args, **kwargs)

    def predict_noise(self, x, timestep, model_options: dict, seed=None) -> Tensor:
        if float(timestep.max()) >= self.lowest_of_teacher * (1 - 1e-6):
            return super().predict_noise(x, timestep, model_options, seed)
        if self.loaded is None:
            self._load(model_options["transformer_options"]["sample_sigmas"], seed)
        return comfy.samplers.sampling_function(
            self.student.model, x, timestep, None, self.conds_of_student["positive"], 1.0, self.options, seed
        )

    def _load(self, sigmas: Tensor, seed: int | None) -> None:
        """Bring the student in, as CFGGuider does with its model."""
        helpers, start = comfy.sampler_helpers, self.start
        self.options = comfy.model_patcher.create_model_options_clone(self.student.model_options)
        self.options.setdefault("transformer_options", {})["sample_sigmas"] = sigmas
        helpers.prepare_model_patcher(self.student, self.conds_of_student, self.options)
        model, conds, self.loaded = helpers.prepare_sampling(
            self.student, start.noise.shape, self.conds_of_student, self.options
        )
        comfy.samplers.cast_to_load_options(self.options, device=start.device, dtype=self.student.model_dtype())
        self.student.pre_run()
        latent_image = start.latent_image
        if latent_image is not None and torch.count_nonzero(latent_image) > 0:
            latent_image = model.process_latent_in(latent_image)
        self.conds_of_student = comfy.samplers.process_conds(
            model, start.noise, conds, start.device, latent_image, seed=seed, **start.conditions
        )

    def _release(self) -> None:
        if self.loaded is not None:
            self.student.cleanup()
            comfy.sampler_helpers.cleanup_models(self.conds_of_student, self.loaded)
            self.loaded = None


class DPDMDFirstStepGuider(io.ComfyNode):
    """The teacher decides the composition, the student finishes."""

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
                io.Conditioning.Input("negative", tooltip="What to avoid; the teacher alone listens to it."),
                io.Int.Input(
                    "teacher_steps",
                    default=1,
                    min=1,
                    max=schedules.MAX_STEPS - 1,
                    tooltip="How many of the schedule's first steps the teacher takes; each is two network calls.",
                ),
                io.Float.Input(
                    "teacher_cfg", default=3.5, min=1.0, max=30.0, step=0.1, tooltip="The teacher's guidance scale."
                ),
            ],
            outputs=[io.Guider.Output("guider", display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, student, teacher, positive, negative, teacher_steps, teacher_cfg) -> io.NodeOutput:
        families = [
            (family_of(model), levels_of(model).prediction, type(model.get_model_object("latent_format")).__name__)
            for model in (student, teacher)
        ]
        if families[0] != families[1]:
            raise ValueError(
                f"student and teacher differ: {' '.join(families[0])} and {' '.join(families[1])}: "
                "connect the teacher that the student was distilled from"
            )
        guider = TeacherFirstGuider(teacher, student, teacher_steps)
        guider.set_conds(positive, negative)
        guider.set_cfg(teacher_cfg)
        return io.NodeOutput(guider)


# ---- loading


class DPDMDLoader(io.ComfyNode):
    """A student's file, refused unless it fits completely."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [f"{folder}/{name}" for folder in weights.FOLDERS for name in folder_paths.get_filename_list(folder)]
        return schema(
            node_id="DPDMDLoader",
            display_name="Load DP-DMD Student",
            description="Loads a full student (diffusers or ComfyUI keys, .safetensors or a released .pt) or a student "
            "that is a LoRA, and keeps its trained schedule at the model. A file that does not fit is an error.",
            inputs=[
                io.Combo.Input(
                    "student_name",
                    options=files,
                    tooltip="Files of models/diffusion_models (full students) and models/loras (LoRA students).",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=["default", "fp8_e4m3fn"],
                    default="default",
                    tooltip="How a full student's weights are held; fp8 halves the memory and changes the picture a "
                    "little. A LoRA takes its base model's.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=2.0,
                    step=0.01,
                    tooltip="Of a LoRA; 1 is how it was trained. A full student has none: leave it at 1.",
                ),
                io.Model.Input("base_model", optional=True, tooltip="For a LoRA: the model it was trained on."),
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The student, with its schedule."),
                io.String.Output("info", display_name="info", tooltip="What was loaded, and how it is sampled."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, student_name, **_others) -> str:
        """Changes when the file does; ComfyUI's own loaders keep a file that was replaced on the disk."""
        path = _path_of(student_name)
        return f"{path} {path.stat().st_mtime_ns} {path.stat().st_size}"

    @classmethod
    def execute(cls, student_name, weight_dtype, strength, base_model=None) -> io.NodeOutput:
        path, name = str(_path_of(student_name)), weights.folder_and_file(student_name)[1]
        state, metadata = weights.load_state(path, name)
        header = weights.read_header(metadata, name)
        is_lora = weights.is_lora(state) if header is None else header.kind == "lora"
        if is_lora:
            if weight_dtype != "default":
                raise ValueError(f"weight_dtype is {weight_dtype}, but {name} is a LoRA: choose it at the base model")
            model, found = _with_lora(base_model, state, header, strength, name)
        else:
            if strength != 1:
                raise ValueError(f"strength is {strength:g}, but {name} is a full student: set it to 1")
            model, found = _full(path, state, header, weight_dtype, name)
        model = _as_trained(model, header)
        info = "\n".join([found, *_described(header, levels_of(model))])
        say(info, cls.hidden.unique_id)
        return io.NodeOutput(model, info)


def _path_of(student_name: str) -> Path:
    folder, name = weights.folder_and_file(student_name)
    path = folder_paths.get_full_path(folder, name)
    if path is None:
        raise FileNotFoundError(f"student_name: {name} is not in models/{folder}: put the file there and refresh")
    return Path(path)


def _full(path: str, state: dict, header: StudentHeader | None, weight_dtype: str, name: str) -> tuple[Any, str]:
    options = {} if weight_dtype == "default" else {"dtype": getattr(torch, weight_dtype.replace("fp8", "float8"))}
    state = weights.without_wrappers(state)
    keys = set(state)  # ComfyUI takes them out of the state while it loads
    model = _network(state, options, name)
    if hasattr(model, "cached_patcher_init"):  # how newer versions make a second copy, for a second GPU
        model.cached_patcher_init = (_network_of, (path, options, name))
    family = family_of(model)
    if header is not None and header.family != family:
        raise ValueError(f"{name}: the header says {header.family}, the weights are {family}: export the student again")
    weights.check_keys(keys, _expected_keys(model, keys, name), name)
    return model, f"{name}: full {family} student, {len(keys)} of {len(keys)} keys"


def _network_of(path: str, options: dict, name: str, **kwargs: Any):
    return _network(weights.without_wrappers(weights.load_state(path, name)[0]), options, name, **kwargs)


def _network(state: dict[str, Tensor], options: dict, name: str, **kwargs: Any):
    first_keys = weights.listed(sorted(state))
    try:
        model = comfy.sd.load_diffusion_model_state_dict(state, model_options=options, **kwargs)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit its network ({weights.first_line(error)}): export it again") from error
    if model is None:
        raise ValueError(f"{name} is no network that ComfyUI knows (keys {first_keys}): export the student again")
    return model


def _expected_keys(model: comfy.model_patcher.ModelPatcher, keys: set[str], name: str) -> set[str]:
    """All keys of a complete file, in the spelling of the file at hand."""
    network, config = set(model.model.diffusion_model.state_dict()), model.model.model_config.unet_config
    spellings = {"sd3": comfy.utils.mmdit_to_diffusers, "sdxl": comfy.utils.unet_to_diffusers}
    if family_of(model) not in spellings:
        raise ValueError(
            f"{name} is a {family_of(model)}, this node checks {' and '.join(spellings)}: "
            "load it with Load Diffusion Model"
        )
    places: dict[Any, list[str]] = {}  # some have two names in diffusers' spelling; a file has one of them
    for key, place in spellings[family_of(model)](config).items():
        if (place if isinstance(place, str) else place[0]) in network:
            places.setdefault(place if isinstance(place, str) else place[:2], []).append(key)
    diffusers = {next((name for name in names if name in keys), names[0]) for names in places.values()}
    return diffusers if len(keys & diffusers) > len(keys & network) else network


def _with_lora(
    base_model, state: dict, header: StudentHeader | None, strength: float, name: str
) -> tuple[comfy.model_patcher.ModelPatcher, str]:
    if base_model is None:
        raise ValueError(f"{name} is a LoRA: connect the model it was trained on to base_model")
    family = family_of(base_model)
    if header is not None and header.family != family:
        raise ValueError(
            f"{name} is a LoRA for {header.family}, base_model is {family}: connect the {header.family} model"
        )
    modules = weights.with_alphas(weights.lora_modules(state, family, name), header)
    places = comfy.lora.model_lora_keys_unet(base_model.model, {})
    network = base_model.model.state_dict()
    shapes = {module: _shape(network, places[module]) for module in modules if module in places}
    weights.check_lora(modules, shapes, name)
    spelled = {
        f"{module}.{part}" if part == "alpha" else f"{module}.{part}.weight": tensor
        for module, parts in modules.items()
        for part, tensor in parts.items()
    }
    model = base_model.clone()
    added = model.add_patches(comfy.lora.load_lora(spelled, places, log_missing=False), strength)
    if len(added) != len(modules):
        raise ValueError(f"{name}: ComfyUI took {len(added)} of {len(modules)} modules: export it again")
    return model, f"{name}: {family} LoRA at strength {strength:g}, {len(added)} of {len(modules)} modules"


def _shape(network: dict[str, Tensor], place: str | tuple) -> tuple[int, ...]:
    """Of the weight, or of the part of a joint weight, that a LoRA's module is for."""
    if isinstance(place, str):
        return tuple(network[place].shape)
    shape = list(network[place[0]].shape)
    axis, _start, length = place[1]
    shape[axis] = length
    return tuple(shape)


def _as_trained(model: comfy.model_patcher.ModelPatcher, header: StudentHeader | None):
    """The model with its header; one that predicts v is set to it, which its weights alone do not tell."""
    if header is None:
        return model
    model = model.clone()
    model.set_attachments(ATTACHMENT, header)
    if header.prediction == "v" and levels_of(model).prediction == "eps":
        model.add_object_patch("model_sampling", _VPrediction(model.model.model_config))
    schedules.trained_sigmas(header, levels_of(model))  # refuses what does not fit, here and not at the sampler
    return model


class _VPrediction(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    pass


def _described(header: StudentHeader | None, levels: Levels) -> list[str]:
    if header is None:
        return ["no DP-DMD header: sampled on its family's published schedule"]
    sigmas = schedules.in_words(schedules.trained_sigmas(header, levels))
    return [f"{header.prediction}, {header.sampler}, {header.steps} steps", f"levels {sigmas}"]


class DPDMDExtension(ComfyExtension):
    """What ComfyUI asks for the nodes."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DPDMDSampler, DPDMDScheduler, DPDMDLoader, DPDMDSamplerSelect, DPDMDNoise, DPDMDFirstStepGuider]
