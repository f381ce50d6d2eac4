"""Nodes of the study: it repeats the rooms train and evaluate, once per recipe and seed."""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple, TypeVar

from pydantic import ValidationError

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.evaluate.nodes import judged_prompts
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.study.options import RunOptions, StudyOptions
from dpdmd_pipeline.pipelines.study.students import Judge, Student, judged_student, make_all
from dpdmd_pipeline.pipelines.train.nodes import train_student
from dpdmd_pipeline.planning.checks import check_anchors, check_optimizers
from dpdmd_pipeline.planning.reuse import student_identity
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

Options = TypeVar("Options", TrainOptions, AnchorRecipe)

SHOWN = {
    "valid": "quality",
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
    """Train and judge every recipe with every seed; what is finished is not done again.

    Several of these, started side by side, share the students.

    Raises:
        ValueError: where prompts are not of the embedded world, whose reader judges here.
    """
    from dpdmd_pipeline.pipelines.evaluate.scoring import exact_presets

    if evaluate.judge != "shapes":
        raise ValueError(f"evaluate.judge={evaluate.judge}: the study is judged by the exact reader, give it shapes")
    line = _Line(prompts, embeddings, anchors, teacher, train_state, backbone)
    runs = {name: _prepare(name, run, line, anchor_options, train) for name, run in options.kept.items()}
    _check(runs, line)  # all of them before the first is trained
    judge = Judge(judged_prompts(prompts, evaluate), embeddings, teacher, backbone, evaluate, train_state)
    found = make_all(options.students, partial(_make, line, runs, judge))
    return {
        "baseline": options.baseline,
        "runs": {name: _recorded(run) for name, run in options.kept.items()},
        "defaults": {
            **train.model_dump(include={"diversity_weight", "max_steps", "stop_gradient"}),
            "steps": anchor_options.anchor_levels[0].steps,
        },
        "judged": {**judge.count(), "exact_presets": exact_presets(evaluate)},
        "teacher": judge.judged(None),
        "rows": [found[student] for student in options.students],
    }


class _Line(NamedTuple):
    """What every student is made from, whatever its recipe."""

    prompts: Iterable[dict]
    embeddings: Any
    anchors: Any
    teacher: Path
    train_state: Path
    backbone: BackboneOptions

    def rows(self) -> list[int]:
        """Of the prompts that are trained on."""
        return [row for row, record in enumerate(self.prompts) if record["train"]]


class _Prepared(NamedTuple):
    """A run with all its options, and the anchors it learns from."""

    train: TrainOptions
    anchor_options: AnchorRecipe
    anchors: Any


def _prepare(name: str, run: RunOptions, line: _Line, anchor_options: AnchorRecipe, train: TrainOptions) -> _Prepared:
    """Other anchors than the cache's are computed in each student turn."""
    with _named(name):
        changed = _changed(train, run.train)
        if not run.anchors:
            return _Prepared(changed, anchor_options, line.anchors)
        asked = _changed(anchor_options, _anchors_of(run))
        own = make_anchors(line.prompts, line.embeddings, line.teacher, line.backbone, asked)
        return _Prepared(changed, asked, own)


@contextmanager
def _named(run: str) -> Iterator[None]:
    """Put the name of a run before what is refused of it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"runs.{run}: {error}") from error


def _anchors_of(run: RunOptions) -> dict[str, Any]:
    """What it changes of the anchors: those of its own are drawn online, which by itself changes a student."""
    return {"mode": "online", **run.anchors} if run.anchors else {}


def _recorded(run: RunOptions) -> dict[str, Any]:
    """What the run changes, as it was trained."""
    recorded = {"train": run.train, "anchors": _anchors_of(run), "baseline": run.baseline}
    return {name: value for name, value in recorded.items() if value}


def _check(runs: Mapping[str, _Prepared], line: _Line) -> None:
    """Refuse anchors that a recipe cannot learn from, and optimizers that are not here."""
    given = line.rows(), line.embeddings, line.teacher, line.backbone
    for name, run in runs.items():
        with _named(name):
            check_optimizers(run.train)
            check_anchors(run.anchors, *given, run.anchor_options, run.train)


def _make(line: _Line, runs: Mapping[str, _Prepared], judge: Judge, student: Student) -> dict[str, Any]:
    """Train and judge one student."""
    seed, name = student
    run = runs[name]
    seeded = run.train.model_copy(update={"seed": seed})
    train = partial(train_student, **line._replace(anchors=run.anchors)._asdict(), anchor_options=run.anchor_options)
    identity = student_identity(seeded.recipe(), line.backbone, run.anchors, line.rows())
    return {"run": name, "seed": seed, **judged_student(partial(train, options=seeded), judge, identity)}


def _changed(options: Options, changes: dict[str, Any]) -> Options:
    """The options with some changed.

    Raises:
        ValueError: names the changes that are refused.
    """
    try:
        return type(options)(**{**options.model_dump(), **changes})
    except ValidationError as error:
        raise ValueError("; ".join(map(_reason, error.errors()))) from error


def _reason(fault: dict[str, Any]) -> str:
    """pydantic's words; those on options that do not go together name them already."""
    words = fault["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, fault['loc']))}={fault['input']!r}: {words}" if fault["loc"] else words


def summarise(study: dict[str, Any]) -> dict[str, dict[str, list]]:
    """Per run and metric the values over the seeds; `gap_recovered` is of effective modes, seed by seed."""
    from dpdmd_pipeline.metrics.summary import gap_recovered

    value = {name: (lambda row, name=name, kind=kind: row[kind][name]["value"]) for name, kind in SHOWN.items()}
    made = {(row["run"], row["seed"]): row for row in study["rows"]}
    teacher = value["effective_modes"](study["teacher"])
    found: dict[str, dict[str, list]] = {}
    for row in study["rows"]:
        of_run = found.setdefault(row["run"], {name: [] for name in [*SHOWN, "gap_recovered"]})
        for name in SHOWN:
            of_run[name].append(value[name](row))
        baseline = study["runs"][row["run"]].get("baseline", study["baseline"])
        lost = value["effective_modes"](made[baseline, row["seed"]])
        of_run["gap_recovered"].append(gap_recovered(teacher, lost, value["effective_modes"](row)))
    return found


def mean_and_spread(values: list, digits: int) -> str:
    """`0.95 ± 0.04`, the standard deviation over the seeds; of one seed its value alone."""
    if None in values:  # a seed whose baseline lost nothing has no gap
        return "no gap"
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def write_study(study: dict[str, Any]) -> str:
    """The study as a Markdown table: mean and standard deviation over the seeds."""
    digits = {"valid": 3, "aligned": 3, "effective_modes": 1, "coverage": 3, "pairwise_distance": 3, "gap_recovered": 2}
    lines = [
        "| run | changes | seeds | " + " | ".join(name.replace("_", " ") for name in digits) + " |",
        "|---" * (len(digits) + 3) + "|",
    ]
    teacher = [f"{study['teacher'][SHOWN[name]][name]['value']:.{digits[name]}f}" for name in SHOWN]
    lines.append("| teacher | | | " + " | ".join([*teacher, ""]) + " |")
    for run, values in summarise(study).items():
        seeds = ", ".join(str(row["seed"]) for row in study["rows"] if row["run"] == run)
        changes = ", ".join(describe(study["runs"][run]))
        cells = [mean_and_spread(values[name], places) for name, places in digits.items()]
        lines.append(f"| {run} | {changes} | {seeds} | " + " | ".join(cells) + " |")
    judged = "{per_prompt} pictures a student for each of {prompts} prompts".format(**study["judged"])
    protocols = "; ".join(f"{name}: {protocol}" for name, protocol in study["judged"]["exact_presets"].items())
    told = "Mean ± standard deviation over the training seeds; gaps are of effective modes, seed by seed."
    return "\n".join([*lines, "", f"{told} {judged} ({protocols}).", ""])


def describe(changes: dict[str, Any]) -> list[str]:
    """`stop_gradient=false`, `anchors.anchor_levels=[{"steps": 4}]`, and the run it is compared with, if named."""
    changed = [
        f"`{prefix}{key}={json.dumps(value)}`"
        for group, prefix in {"train": "", "anchors": "anchors."}.items()
        for key, value in changes.get(group, {}).items()
    ]
    return [*changed, f"gap of {changes['baseline']}"] if "baseline" in changes else changed
