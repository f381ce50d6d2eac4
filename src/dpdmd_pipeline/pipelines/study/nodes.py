"""Nodes of the study: it repeats the rooms train and evaluate, once per recipe and seed."""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.evaluate.nodes import judged_prompts, sample_model
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.pipelines.train.checks import check_anchors
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.pipelines.train.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

log = logging.getLogger(__name__)

SHOWN = {
    "aligned": "quality",
    "effective_modes": "diversity",
    "coverage": "diversity",
    "pairwise_distance": "diversity",
}


def run_study(
    prompts: Iterable[dict],
    embeddings: Any,
    anchors: Any,
    teacher: Path,
    train_state: Path,
    backbone: BackboneOptions,
    anchor_options: AnchorRecipe,
    train: TrainOptions,
    evaluate: EvaluateOptions,
    options: StudyOptions,
) -> dict[str, Any]:
    """Train and judge every recipe with every seed; a run that is finished is read from its checkpoint.

    Raises:
        ValueError: where prompts are not of the embedded world, whose reader judges here.
    """
    if evaluate.judge != "shapes":
        raise ValueError(f"evaluate.judge={evaluate.judge}: the study is judged by the exact reader, give it shapes")
    recipes = {name: _recipe(name, train, changes) for name, changes in options.runs.items()}
    rows = [row for row, record in enumerate(prompts) if record["train"]]
    for recipe in recipes.values():  # all of them before the first is trained
        check_anchors(anchors, rows, embeddings, teacher, backbone, anchor_options, recipe)
    chosen = judged_prompts(prompts, evaluate)

    def judged(folder: Path | None) -> dict[str, Any]:
        drawn = sample_model(folder, chosen, embeddings, teacher, backbone, evaluate)
        return _judge(drawn, chosen, evaluate)

    found = []
    for seed in options.seeds:
        for name, recipe in recipes.items():
            log.info("study: %s, seed %d", name, seed)
            seeded = recipe.model_copy(update={"seed": seed})
            write, history = train_student(
                prompts, embeddings, anchors, teacher, train_state, backbone, anchor_options, seeded
            )
            with tempfile.TemporaryDirectory() as folder:
                write(Path(folder))
                found.append({"run": name, "seed": seed, **judged(Path(folder)), "last": history[-1]})
    return {"baseline": options.baseline, "runs": options.runs, "teacher": judged(None), "rows": found}


def _judge(drawn: dict[str, Any], chosen: dict[int, str], options: EvaluateOptions) -> dict[str, Any]:
    """Quality and diversity of one model's pictures."""
    from dpdmd_pipeline.metrics.shapes import judge

    per_prompt = [drawn["image"][drawn["prompt"] == row] / 255 for row in chosen]
    return judge(per_prompt, list(chosen.values()), options.seed)


def _recipe(name: str, train: TrainOptions, changes: dict[str, Any]) -> TrainOptions:
    """The train options with some changed.

    Raises:
        ValueError: names the run whose changes do not make a recipe.
    """
    try:
        return TrainOptions(**{**train.model_dump(), **changes})
    except ValueError as error:
        reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors())
        raise ValueError(f"study.runs.{name}: {reasons}") from error


def summarise(study: dict[str, Any]) -> dict[str, dict[str, list]]:
    """Per run and metric the values over the seeds; `gap_recovered` is of effective modes, seed by seed."""
    from dpdmd_pipeline.metrics.summary import gap_recovered

    value = {name: (lambda row, name=name, kind=kind: row[kind][name]["value"]) for name, kind in SHOWN.items()}
    baseline = {row["seed"]: row for row in study["rows"] if row["run"] == study["baseline"]}
    teacher = value["effective_modes"](study["teacher"])
    found: dict[str, dict[str, list]] = {}
    for row in study["rows"]:
        of_run = found.setdefault(row["run"], {name: [] for name in [*SHOWN, "gap_recovered"]})
        for name in SHOWN:
            of_run[name].append(value[name](row))
        lost = value["effective_modes"](baseline[row["seed"]])
        of_run["gap_recovered"].append(gap_recovered(teacher, lost, value["effective_modes"](row)))
    return found


def _spread(values: list, digits: int) -> str:
    if None in values:  # a seed whose baseline lost nothing has no gap
        return "no gap"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def write_study(study: dict[str, Any]) -> str:
    """The study as a Markdown table: mean and standard deviation over the seeds."""
    digits = {"aligned": 3, "effective_modes": 1, "coverage": 3, "pairwise_distance": 3, "gap_recovered": 2}
    lines = [
        "| run | changes | " + " | ".join(name.replace("_", " ") for name in digits) + " |",
        "|---" * (len(digits) + 2) + "|",
    ]
    teacher = [f"{study['teacher'][SHOWN[name]][name]['value']:.{digits[name]}f}" for name in SHOWN]
    lines.append("| teacher | | " + " | ".join([*teacher, ""]) + " |")
    for run, values in summarise(study).items():
        changes = ", ".join(f"`{key}={value}`" for key, value in study["runs"][run].items())
        cells = [_spread(values[name], places) for name, places in digits.items()]
        lines.append(f"| {run} | {changes} | " + " | ".join(cells) + " |")
    seeds = sorted({row["seed"] for row in study["rows"]})
    return "\n".join([*lines, "", f"Mean ± standard deviation over the training seeds {seeds}.", ""])


def draw_study(study: dict[str, Any]) -> Any:
    """Quality against diversity, one point per student."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axis = figure.subplots()
    for name, values in summarise(study).items():
        axis.scatter(values["effective_modes"], values["aligned"], label=name)
    teacher = study["teacher"]
    axis.scatter(
        teacher["diversity"]["effective_modes"]["value"],
        teacher["quality"]["aligned"]["value"],
        marker="*",
        s=160,
        color="black",
        label="teacher",
    )
    axis.set(xlabel="effective modes (diversity)", ylabel="aligned (quality)", title="One point per training seed")
    axis.legend(loc="lower right")
    return figure
