"""Sampling by teacher and student: network evaluations, seconds, and our sampler's overhead over bare network calls.

python benchmarks/bench_sampler.py
python benchmarks/bench_sampler.py --env sd35 --config sd35_medium --device cuda --batch 4
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import timing
import workload
from dpdmd_pipeline.backbones.base import Backbone, Conditioning, guided
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.exporting.sample import OpenStudent, draw_latents
from record import record
from workload import Workload

TEACHER, BARE_TEACHER = "teacher", "teacher, bare network calls"
STUDENT, BARE_STUDENT = "student", "student, bare network calls"


def main(args: argparse.Namespace) -> None:
    """Time both. The student has the teacher's weights: a network's time does not depend on them."""
    logging.disable(logging.INFO)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        work = workload.prepare(args, Path(folder))
        family = work.backbone.load(work.teacher, args.device)
        network = family.load_model().requires_grad_(False).eval()
        samplers = _samplers(work, family, network)
        evaluations = {name: _count(network, draw) / args.batch for name, draw in samplers.items()}
        latents = samplers[STUDENT]()
        family.decode(latents[:1])  # loads the autoencoder
        contenders = {**samplers, "decoding": partial(family.decode, latents)}
        durations = timing.alternate(contenders, args.seconds, at_least=5)
    which = timing.clock(work.device)
    per_picture = {name: [s / args.batch for s in timing.seconds(calls, which)] for name, calls in durations.items()}
    record(
        args.result or "sampler",
        {
            **{f"{name}, network evaluations per picture": count for name, count in evaluations.items()},
            **{f"{name}, seconds per picture": timing.spread(values) for name, values in per_picture.items()},
            "evaluations, teacher / student": evaluations[TEACHER] / evaluations[STUDENT],
            "seconds, teacher / student": timing.ratios(durations[TEACHER], durations[STUDENT], which),
            "overhead of the teacher's sampler": _overhead(durations, TEACHER, BARE_TEACHER, which),
            "overhead of the student's sampler": _overhead(durations, STUDENT, BARE_STUDENT, which),
            "seconds are": timing.UNITS[which],
            "settings": work.settings(),
            **timing.conditions(),
        },
    )


def _overhead(durations: dict[str, list[timing.Duration]], sampler: str, bare: str, which: str) -> dict[str, float]:
    ratios = timing.ratios(durations[sampler], durations[bare], which)
    return {name: value if name == "n" else value - 1 for name, value in ratios.items()}


def _samplers(work: Workload, family: Backbone, network: nn.Module) -> dict[str, Callable[[], Tensor]]:
    """Calls that draw the latents of one batch each."""
    count, seeds = work.train.batch_size, range(work.train.batch_size)
    rows = [number % len(work.prompts) for number in seeds]
    cond = {name: value.to(family.device) for name, value in work.embeddings.rows(rows).items()}
    uncond = {name: v.to(family.device) for name, v in work.embeddings.rows([len(work.embeddings) - 1]).items()}
    both = {name: torch.cat([value, uncond[name].expand_as(value)]) for name, value in cond.items()}
    levels = family.schedule(work.backbone.num_steps)
    student = _student(work, family, network)
    noise = noise_from_seeds(seeds, family.latent_shape).to(family.device)

    def teacher() -> Tensor:
        return rollout(guided(family, network, cond, uncond, work.backbone.guidance_scale), noise, levels)

    twice = noise if work.backbone.guidance_scale == 1 else torch.cat([noise, noise])
    return {
        TEACHER: teacher,
        BARE_TEACHER: partial(_bare, network, family, twice, levels, cond if len(twice) == count else both),
        STUDENT: partial(draw_latents, student, cond, seeds),
        BARE_STUDENT: partial(_bare, network, family, noise, student.levels, cond),
    }


def _student(work: Workload, family: Backbone, network: nn.Module) -> OpenStudent:
    levels = family.student_schedule(work.train.grid, work.train.num_steps)
    header: dict[str, Any] = {"family": work.backbone.family, "prediction": family.prediction}
    if family.prediction == "flow":
        header |= {"sigmas": levels.sigma.tolist()}
    else:
        header |= {"timesteps": [int(timestep) for timestep in levels.timestep[:-1]]}
    return OpenStudent(StudentHeader(**header), family, network, levels)


def _bare(network: nn.Module, family: Backbone, noise: Tensor, levels: NoiseLevel, cond: Conditioning) -> Tensor:
    """Call the network once per level on the same prepared inputs; returns its last output."""
    inputs = {
        "hidden_states": noise.to(family.dtype),
        "encoder_hidden_states": cond["prompt_embeds"].to(family.dtype),
        "pooled_projections": cond["pooled_embeds"].to(family.dtype),
    }
    for level in levels[:-1]:
        output = network(timestep=level.timestep.expand(len(noise)), **inputs).sample
    return output


def _count(network: nn.Module, draw: Callable[[], Tensor]) -> int:
    """Count the samples that pass through the network."""
    batch_sizes: list[int] = []
    handle = network.register_forward_hook(lambda _module, _args, output: batch_sizes.append(len(output[0])))
    draw()
    handle.remove()
    return sum(batch_sizes)


if __name__ == "__main__":
    main(workload.parser(__doc__).parse_args())
