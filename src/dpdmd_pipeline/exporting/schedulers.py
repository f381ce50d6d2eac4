"""Stock diffusers schedulers that give exactly the levels that a student was trained at, and how they are called."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
)

from dpdmd_pipeline.backbones.base import guidance_arguments, static_shift, teacher_grid
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.limits import read_json

_ROUNDING = 2e-7  # of levels up to 1 in float32
_LEAST = 1e-3  # level of the last training timestep, before the shift
_BETAS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "num_train_timesteps", "rescale_betas_zero_snr")
_DIFFUSERS_PREDICTION = {"eps": "epsilon", "v": "v_prediction"}


class DiffusersUse(NamedTuple):
    """Arguments with which diffusers draws with a student."""

    load: Mapping[str, Any]  # further arguments of the pipeline's `from_pretrained`
    call: Mapping[str, Any]  # arguments of the pipeline's call, without prompts and generators
    defaults: Mapping[str, Any]  # values that diffusers takes for those of them that are left out
    scheduler: str  # name of the scheduler's class
    settings: Mapping[str, Any]  # of the scheduler, without its defaults
    passes_generators: bool  # True if the pipeline's generators also make the noise between the sampling steps


def diffusers_use(header: StudentHeader, teacher: Path) -> DiffusersUse:
    """Arguments for diffusers, from the signatures of the teacher's pipeline and of the scheduler."""
    index = read_json(teacher / "model_index.json")
    pipeline, schedule = getattr(diffusers, index["_class_name"]), trained_schedule(header, teacher_scheduler(teacher))
    absent = {name for name, value in index.items() if value == [None, None]}
    height, width = (*header.sizes, (None, None))[0]
    facts = {
        "num_inference_steps": header.num_steps,
        **guidance_arguments(header.family, header.guidance),
        **schedule.arguments,
        "height": height,
        "width": width,
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


def teacher_scheduler(teacher: Path) -> dict[str, Any]:
    """The config of the teacher's own scheduler."""
    return read_json(teacher / "scheduler" / "scheduler_config.json")


class TrainedSchedule(NamedTuple):
    """A scheduler, and further arguments of the pipeline's call."""

    scheduler: SchedulerMixin  # of a stock class
    arguments: dict[str, Any]  # `sigmas` before the scheduler's shift, or `timesteps`; {} if neither is needed


def trained_schedule(header: StudentHeader, teacher_config: dict[str, Any]) -> TrainedSchedule:
    """Find the scheduler with a student's levels and its teacher's noise table, from the teacher's scheduler config."""
    if header.prediction == "flow":
        return _flow_schedule(header, teacher_config)
    return _vp_schedule(header, teacher_config)


# ---- flow


def _flow_schedule(header: StudentHeader, teacher_config: dict[str, Any]) -> TrainedSchedule:
    """Euler with the first candidate shift that gives the levels, or none, and the sigmas that it turns into them.

    The number of steps alone is not enough: versions of diffusers differ in how often they shift the end points of the
    schedule. Sigmas of the call are shifted once by all of them.
    """
    trained = torch.tensor(header.sigmas)
    fixed = {"stochastic_sampling": header.sampler == "renoise"}
    even = torch.linspace(1, 1 / header.num_steps, header.num_steps).tolist()  # of pipelines that give their own
    own = even if teacher_grid(header.family) == "shifted" else None
    for shift, shift_terminal in _shifts(header.sigmas, float(header.shift or static_shift(teacher_config))):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift, shift_terminal=shift_terminal, **fixed)
        scheduler.set_timesteps(header.num_steps, sigmas=own)
        if (scheduler.sigmas - trained).abs().max() <= _ROUNDING:
            sigmas = [round(_shift(sigma, 1 / shift), 8) for sigma in header.sigmas[:-1]]
            return TrainedSchedule(FlowMatchEulerDiscreteScheduler.from_config(scheduler.config), {"sigmas": sigmas})
    return TrainedSchedule(FlowMatchEulerDiscreteScheduler(shift=1.0, **fixed), {"sigmas": header.sigmas[:-1]})


def _shifts(sigmas: list[float], teacher_shift: float) -> Iterator[tuple[float, float | None]]:
    """Pairs (shift, shift_terminal) to try: the teacher's, none, then those that fit the second and last level."""
    yield teacher_shift, None
    yield 1.0, None
    last = sigmas[-2]
    if len(sigmas) == 3:
        yield 1.0, last
    if len(sigmas) > 3 and sigmas[0] == 1:
        yield _fitted_shift((1 - sigmas[1]) / (1 - last), len(sigmas) - 1), last


def _fitted_shift(ratio: float, num_steps: int) -> float:
    """Shift at which (1 - second level) / (1 - last level) is `ratio`.

    FlowMatchEulerDiscreteScheduler shifts N even levels from 1 to its own (shifted) end point and stretches the
    result to `shift_terminal`, which preserves this ratio. All grids that were shifted once have this form, for
    example linspace(1, 1/N, N) at shift 3.
    """
    # With end point e(s), the ratio decides q = (1 - 1 / s) (1 - e(s)): a quadratic equation in s.
    q = (1 - ratio * (num_steps - 1)) / (1 - ratio)
    half, least = (1 - q) * (1 - _LEAST) / 2, _LEAST * (1 - _LEAST)
    return (1 - _LEAST) / (half + max(0.0, half**2 - q * least) ** 0.5)


def _shift(sigma: float, shift: float) -> float:
    return shift * sigma / (1 + (shift - 1) * sigma)


# ---- VP


def _vp_schedule(header: StudentHeader, teacher_config: dict[str, Any]) -> TrainedSchedule:
    """A scheduler with trailing spacing if it gives the timesteps; if not, the caller passes the timesteps."""
    make = _deterministic if header.sampler == "euler" else _renoising
    table = {key: teacher_config[key] for key in _BETAS if key in teacher_config}
    scheduler = make(header, table | {"prediction_type": _DIFFUSERS_PREDICTION[header.prediction]})
    scheduler.set_timesteps(header.num_steps)
    arguments = {} if scheduler.timesteps.tolist() == header.timesteps else {"timesteps": header.timesteps}
    return TrainedSchedule(type(scheduler).from_config(scheduler.config), arguments)


def _deterministic(header: StudentHeader, table: dict[str, Any]) -> SchedulerMixin:
    """DDIM with eta 0, or DPM-Solver++ of order 1 for uneven timesteps.

    DDIMScheduler assumes evenly spaced timesteps. DPM-Solver++ of order 1 is the same step between any two levels and
    also starts from unit variance. Steps that no stock scheduler makes exactly are refused.
    """
    stride = table["num_train_timesteps"] // header.num_steps
    ends = [*header.timesteps[1:], None]
    pairs = zip(header.timesteps, ends, strict=True)
    if all((start - stride if start >= stride else None) == end for start, end in pairs):
        return DDIMScheduler(timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, **table)
    if table.get("rescale_betas_zero_snr"):  # DPM-Solver replaces alpha 0 by a small one
        raise ValueError(
            f"timesteps {header.timesteps} of a zero-terminal-SNR model (rescale_betas_zero_snr): no scheduler of "
            "diffusers is exact at uneven timesteps; train on the grid trailing, or export comfyui alone"
        )
    return DPMSolverMultistepScheduler(
        solver_order=1, algorithm_type="dpmsolver++", timestep_spacing="trailing", final_sigmas_type="zero", **table
    )


def _renoising(header: StudentHeader, table: dict[str, Any]) -> SchedulerMixin:
    """LCMScheduler as a plain re-noising sampler: a large scaling removes the skip connection of consistency models."""
    return LCMScheduler(original_inference_steps=header.num_steps, timestep_scaling=1e6, clip_sample=False, **table)
