"""Checks before a run that its evaluation can judge the pictures: prompts, resolution, packages of the metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from dpdmd_pipeline.backbones.sizes import Resolution, check_resolution
from dpdmd_pipeline.metrics.errors import not_installed
from dpdmd_pipeline.wording import counted, listed, short

USERS = {"make_anchors", "train_dmd", "train_student", "judged_prompts", "run_study"}  # nodes that use prompts
FEW, LETTERS = 3, 40  # foreign prompts in the message, and characters of each


def unjudgeable(pipeline: Any, catalog: Any) -> Iterator[str]:
    """One line for each reason why the run's evaluation cannot judge its pictures.

    Training prompts count too: the embedded teacher has never seen other words, so it cannot draw them.
    """
    if "params:evaluate" not in catalog:
        return
    nodes = {node.name for node in pipeline.nodes}
    if option(catalog, "evaluate", "judge") == "shapes":
        if nodes & USERS and (line := foreign_line(_texts(pipeline, catalog))):
            yield line
        if nodes & (USERS | {"score_images"}) and "params:backbone" in catalog:
            yield from _other_sizes(check_resolution(option(catalog, "backbone", "resolution")))
    if "score_images" in nodes:
        yield from _missing_packages(option(catalog, "evaluate", "by"))
    start = option(catalog, "evaluate", "teacher_start")
    if start and {"sample_images", "train_dmd"} <= nodes:
        try:
            start.check_landing(option(catalog, "train_dmd", "num_steps"))
        except ValueError as error:
            yield f"evaluate.{error}"


def foreign_line(texts: Iterable[str]) -> str | None:
    """Error message about prompts outside the embedded world; None if there are none."""
    from dpdmd_pipeline.shapes.world import COLOURS, SHAPES, prompt_index

    foreign = []
    for text in texts:
        try:
            prompt_index(text)
        except ValueError:
            foreign.append(text)
    if not foreign:
        return None
    examples = listed([repr(short(text, LETTERS)) for text in foreign], FEW)
    return (
        f"{counted(len(foreign), 'prompt is', 'prompts are')} not of the shapes world ({examples}), and "
        f"evaluate.judge=shapes reads no other pictures: name one colour ({', '.join(COLOURS)}) and one shape "
        f"({', '.join(SHAPES)}) in each prompt, choose an environment with your own teacher, or set evaluate.judge=null"
    )


def _texts(pipeline: Any, catalog: Any) -> Iterator[str]:
    """Texts of the prompts, or the lines of their files if this run cleans them first."""
    if "prompts" not in pipeline.all_outputs():
        yield from (record["text"] for record in catalog.get("prompts").load())
        return
    own_file = option(catalog, "prompts", "eval_share") is None
    for name in ("raw_prompts", "raw_eval_prompts") if own_file else ("raw_prompts",):
        yield from (line.text for line in catalog.get(name).load().lines() if line.text.strip())


def option(catalog: Any, group: str, name: str) -> Any:
    """One option of a stage; its group is a dict if the stage itself does not run."""
    options = catalog.get(f"params:{group}").load()
    return options.get(name) if isinstance(options, Mapping) else getattr(options, name)


def _other_sizes(resolution: Resolution) -> Iterator[str]:
    from dpdmd_pipeline.shapes.world import RESOLUTION

    if resolution != RESOLUTION:
        yield (
            f"backbone.resolution = {resolution}: evaluate.judge=shapes and the embedded teachers know pictures of "
            f"{RESOLUTION} x {RESOLUTION} pixels only; set backbone.resolution={RESOLUTION}, or with your own teacher "
            "evaluate.judge=null and other metrics in evaluate.by"
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
