"""Nodes of the study: train and evaluate once per recipe and seed, then write the table."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.evaluate.nodes import judged_prompts
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.study.options import RunOptions, StudyOptions
from dpdmd_pipeline.pipelines.study.students import Judge, Student, judge_student, make_all
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.planning.checks import changed_options, check_anchors, check_optimizers
from dpdmd_pipeline.planning.identity import student_identity
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

SHOWN = {  # metrics of the table, with their kind
    "valid": "quality",
    "aligned": "quality",
    "effective_modes": "diversity",
    "coverage": "diversity",
    "pairwise_distance": "diversity",
}
DIGITS = {"valid": 3, "aligned": 3, "effective_modes": 1, "coverage": 3, "pairwise_distance": 3, "gap_recovered": 2}


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
    """Train and judge every recipe with every seed; finished students are reused.

    Several processes that run this node share the students.
    """
    from dpdmd_pipeline.pipelines.evaluate.scoring import EXACT_PRESETS
    from dpdmd_pipeline.scoring.presets import choose

    if evaluate.judge != "shapes":
        raise ValueError(
            f"evaluate.judge={evaluate.judge}, but the study needs the exact reader: set evaluate.judge=shapes"
        )
    default = _Run(prompts, embeddings, anchors, teacher, train_state, None, backbone, anchor_options, train)
    runs = {}
    for name, changes in options.active_runs.items():  # checked before the first training
        with _naming(name):
            runs[name] = _change(default, changes)
    judge = Judge(judged_prompts(prompts, evaluate), embeddings, teacher, backbone, evaluate, train_state)
    results = make_all(options.students, partial(_make, runs, options.active_runs, judge))
    return {
        "baseline": options.baseline,
        "runs": {name: _record(changes, runs[name]) for name, changes in options.active_runs.items()},
        "defaults": {
            **train.model_dump(include={"diversity_weight", "max_steps", "stop_gradient"}),
            "steps": anchor_options.anchor_levels[0].steps,
        },
        "judged": {
            "prompts": len(judge.chosen),
            "per_prompt": evaluate.images_per_prompt,
            "exact_presets": {preset.full_name: preset.protocol for preset in choose(EXACT_PRESETS)},
        },
        "teacher": {"evaluations": backbone.evaluations, **judge.measure(None)},
        "rows": [results[student] for student in options.students],
    }


class _Run(NamedTuple):
    """Arguments of `train_student`."""

    prompts: Iterable[dict]
    embeddings: Any
    anchors: Any
    teacher: Path
    train_state: Path
    finished_student: None
    backbone: BackboneOptions
    anchor_options: AnchorRecipe
    options: TrainOptions

    def rows(self) -> list[int]:
        """Rows of the training prompts."""
        return [row for row, record in enumerate(self.prompts) if record["train"]]


def _change(run: _Run, changes: RunOptions) -> _Run:
    """Apply changes and check the recipe; anchors that the cache lacks are drawn in every cycle."""
    options, anchor_options = changed_options(run.options, run.anchor_options, changes)
    run = run._replace(options=options, anchor_options=anchor_options)
    if changes.anchors:
        inputs = run.prompts, run.embeddings, run.teacher, run.backbone
        run = run._replace(anchors=make_anchors(*inputs, anchor_options, options))
    check_optimizers(run.options)
    check_anchors(run.anchors, run.rows(), run.embeddings, run.teacher, run.backbone, run.anchor_options, run.options)
    return run


@contextmanager
def _naming(run: str) -> Iterator[None]:
    """Start error messages with the name of the run."""
    try:
        yield
    except StageError as error:
        raise type(error)(f"runs.{run}: {error.fact}", error.stage) from error
    except ValueError as error:
        raise ValueError(f"runs.{run}: {error}") from error


def _record(changes: RunOptions, run: _Run) -> dict[str, Any]:
    """Changes of a run for study.json, and its network evaluations for a picture."""
    evaluations = run.options.num_steps
    if start := changes.teacher_start:
        evaluations += start.evaluations(run.backbone.guidance_scale) - start.landing
    record = {
        "train": changes.train,
        "anchors": changes.anchors and {"mode": "online", **changes.anchors},
        **changes.model_dump(include={"teacher_start", "prompt_noise"}, exclude_none=True),
        "baseline": changes.baseline,
        "evaluations": evaluations,
    }
    return {name: value for name, value in record.items() if value}


def _make(
    runs: Mapping[str, _Run], changes: Mapping[str, RunOptions], judge: Judge, student: Student
) -> dict[str, Any]:
    """Train and judge one student; runs that differ in their start share the trained student."""
    seed, name = student
    run = runs[name]._replace(options=runs[name].options.model_copy(update={"seed": seed}))
    identity = student_identity(run.options.recipe(), run.backbone, run.anchors, run.rows())
    judged = judge_student(partial(train_student, *run), judge, identity, changes[name].start)
    return {"run": name, "seed": seed, **judged}


def summarise(study: dict[str, Any]) -> dict[str, dict[str, list]]:
    """Values over the seeds by run and metric; `gap_recovered` is of effective modes, seed by seed.

    A committed study may have options that no longer exist, so it is read without the options' classes.
    """
    from dpdmd_pipeline.metrics.summary import gap_recovered

    modes = {(row["run"], row["seed"]): figure_value(row, "effective_modes") for row in study["rows"]}
    teacher = figure_value(study["teacher"], "effective_modes")
    summary: dict[str, dict[str, list]] = {}
    for row in study["rows"]:
        run, seed = row["run"], row["seed"]
        values = summary.setdefault(run, {name: [] for name in [*SHOWN, "gap_recovered"]})
        for name in SHOWN:
            values[name].append(figure_value(row, name))
        baseline = study["runs"][run].get("baseline", study["baseline"])
        values["gap_recovered"].append(gap_recovered(teacher, modes[baseline, seed], modes[run, seed]))
    return summary


def figure_value(judged: dict[str, Any], metric: str) -> float:
    """Value of a metric of SHOWN for the teacher or a student."""
    return judged[SHOWN[metric]][metric]["value"]


def mean_and_spread(values: list, digits: int) -> str:
    """`0.95 ± 0.04`, mean and standard deviation over the seeds; the value alone for one seed."""
    if None in values:  # a seed whose baseline lost nothing has no gap
        return "no gap"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def write_study(study: dict[str, Any]) -> str:
    """The study as a Markdown table: mean and standard deviation over the seeds."""
    lines = [
        "| run | changes | seeds | " + " | ".join(name.replace("_", " ") for name in DIGITS) + " |",
        "|---" * (len(DIGITS) + 3) + "|",
    ]
    teacher = [f"{figure_value(study['teacher'], name):.{DIGITS[name]}f}" for name in SHOWN]
    lines.append("| teacher | | | " + " | ".join([*teacher, ""]) + " |")
    for run, values in summarise(study).items():
        seeds = ", ".join(str(row["seed"]) for row in study["rows"] if row["run"] == run)
        changes = ", ".join(describe(study["runs"][run]))
        cells = [mean_and_spread(values[name], digits) for name, digits in DIGITS.items()]
        lines.append(f"| {run} | {changes} | {seeds} | " + " | ".join(cells) + " |")
    counts = "{per_prompt} pictures per student for each of {prompts} prompts".format(**study["judged"])
    protocols = "; ".join(f"{name}: {protocol}" for name, protocol in study["judged"]["exact_presets"].items())
    note = "Mean ± standard deviation over the training seeds; gaps are of effective modes, seed by seed."
    return "\n".join([*lines, "", f"{note} {counts} ({protocols}).", ""])


def describe(changes: dict[str, Any]) -> list[str]:
    """Changes of a run: `stop_gradient=false`, `anchors.anchor_levels=[{"steps": 4}]`, and its own baseline if any."""
    texts = [
        f"`{prefix}{key}={json.dumps(value)}`"
        for group, prefix in {"train": "", "anchors": "anchors."}.items()
        for key, value in changes.get(group, {}).items()
    ]
    for key in {"teacher_start", "prompt_noise"} & changes.keys():
        texts += [f"`{key}={json.dumps(changes[key])}`", f"{changes['evaluations']} evaluations"]
    return [*texts, f"gap of {changes['baseline']}"] if "baseline" in changes else texts
