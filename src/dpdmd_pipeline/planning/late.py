"""Checks before a run of options that only a late stage would refuse: seeds, metrics, size of the judged pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dpdmd_pipeline.metrics.errors import not_installed
from dpdmd_pipeline.planning.prompts import option

LAST_NOISE_SEED = 2**32 - 1  # of `dpdmd.sampling.noise_from_seeds`
LAST_SEED = 2**63 - 1  # of torch, with room for the steps that a training adds


def late_refusals(pipeline: Any, catalog: Any) -> Iterator[str]:
    """One line for each option that a later stage of the run cannot work with."""
    nodes = {node.name for node in pipeline.nodes}
    groups = sorted(name for name in pipeline.inputs() if name.startswith("params:") and name in catalog)
    for name in groups:
        yield from _large_seeds(name.removeprefix("params:"), catalog.get(name).load())
    if "draw_samples" in nodes:
        yield from _large_sample_seed(catalog)
    if nodes & {"score_images", "run_study"} and "params:evaluate" in catalog and "params:backbone" in catalog:
        yield from _other_resolution(catalog)
    if "score_images" in nodes and "params:evaluate" in catalog:
        yield from _missing_packages(option(catalog, "evaluate", "by"))


def _large_seeds(name: str, options: Any) -> Iterator[str]:
    """Lines for seeds that torch refuses, at any depth of a group."""
    for key, value in options.items() if isinstance(options, Mapping) else getattr(options, "__dict__", {}).items():
        if key == "seed" and isinstance(value, int) and value > LAST_SEED:
            yield f"{name}.{key} = {value}: give at most {LAST_SEED}"
        yield from _large_seeds(f"{name}.{key}", value)


def _large_sample_seed(catalog: Any) -> Iterator[str]:
    seed, pictures = option(catalog, "sample", "seed"), option(catalog, "sample", "images_per_prompt")
    last = seed + pictures - 1
    if last > LAST_NOISE_SEED and seed <= LAST_SEED:
        yield (
            f"sample.seed = {seed}: with sample.images_per_prompt = {pictures} the last seed is {last}; "
            f"give at most {LAST_NOISE_SEED + 1 - pictures}"
        )


def _other_resolution(catalog: Any) -> Iterator[str]:
    from dpdmd_pipeline.shapes.world import RESOLUTION

    resolution = option(catalog, "backbone", "resolution")
    if option(catalog, "evaluate", "judge") == "shapes" and resolution != RESOLUTION:
        yield (
            f"backbone.resolution = {resolution}: evaluate.judge=shapes reads pictures of {RESOLUTION} pixels; "
            f"set backbone.resolution={RESOLUTION}, or evaluate.judge=null and other metrics in evaluate.by"
        )


def _missing_packages(names: list[str]) -> Iterator[str]:
    """Lines for an unknown metric and for metrics whose package is not installed; nothing is imported."""
    from dpdmd_pipeline.scoring import builders
    from dpdmd_pipeline.scoring.presets import choose

    needs = {
        builders.arniqa: ("torchmetrics", "torchmetrics", "metrics"),
        builders.lpips: ("torchmetrics", "torchmetrics", "metrics"),
        builders.inception: ("torch_fidelity", "torch-fidelity", "metrics"),
        builders.pyiqa: ("pyiqa", "pyiqa", "iqa"),
    }
    try:
        presets = choose(",".join(names))
    except ValueError as error:
        yield f"evaluate.by: {error}"
        return
    for preset in presets:
        module, package, extra = needs.get(getattr(preset.build, "func", preset.build), (None, "", ""))
        if module and find_spec(module) is None:
            yield f"evaluate.by: {preset.full_name}: {not_installed(package, extra)}, or leave the metric out"
