"""The plan of a Kedro run: its inputs, options and outputs, and the caches and students that it can reuse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions, TeacherStart
from dpdmd_pipeline.datasets.pretrained import hub_cache
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.planning.cost import anchored_prompts
from dpdmd_pipeline.planning.identity import state_folder, student_identity, texts_digest
from dpdmd_pipeline.planning.judging import option
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe

COSTLY = {"encode_prompts", "make_anchors", "train_dmd", "train_student", "sample_images", "export_student"}  # nodes
READ = {"teacher", "params:backbone", "params:anchors", "params:train", "params:train_dmd", "params:evaluate"}
WEIGHTS = {"student", "student_dmd", "export"}  # datasets
CHOICE = ("take", "seed", "eval_share")  # options that decide the prompts
STUDENTS = {"train_dmd": "train_dmd", "train_student": "train"}  # node -> parameter group
TRAINED = {"train_dmd": "student_dmd", "train": "student"}  # parameter group -> dataset
PUBLISHED = {"train_dmd": "finished_student_dmd", "train": "finished_student"}  # parameter group -> dataset


class Counts(NamedTuple):
    """Numbers of prompts; upper bounds before the raw files are cleaned."""

    total: int
    trained: int
    evaluated: int


class Drawn(NamedTuple):
    """Pictures of the evaluation."""

    facts: Mapping[str, int]  # images_per_prompt and seed, as in the manifest of the images
    evaluations: Mapping[str, int]  # network passes for a picture, by model
    as_files: bool


@dataclass(frozen=True)
class Plan:
    """Inputs, options and outputs of a run. Students go by their parameter groups."""

    teacher: Path  # folder; its configs are enough
    backbone: BackboneOptions
    anchors: AnchorRecipe
    trained: Mapping[str, TrainOptions]
    prompts: Counts | None = None  # if known
    folders: Mapping[str, Path] = field(default_factory=dict)  # of the large outputs, by dataset
    reused: frozenset[str] = frozenset()  # published caches that belong to this run
    states: Mapping[str, Path] = field(default_factory=dict)  # folders of the students' checkpoints, if known
    finished: frozenset[str] = frozenset()  # students that are published already
    train: TrainOptions | None = None  # of the students that draw from the anchors; None: of any number of samples
    drawn: Drawn | None = None  # if the run evaluates
    exported: tuple[Sequence[str], str] | None = None  # forms of the export and their dtype, if the run exports
    download: int = 0  # bytes of the teacher that are not on this disk yet
    is_pretrained: bool = False  # somebody else trained the teacher; embedded ones are small

    @property
    def anchored(self) -> tuple[int, int]:
        """Prompts in the cache of anchors, and anchors of each; the prompts must be known."""
        return anchored_prompts(self.prompts.trained, self.anchors, self.train)

    @cached_property
    def model(self) -> Any:
        """The teacher's adapter; ValueError or OSError if the folder does not fit the options."""
        return self.backbone.load(self.teacher, "cpu")

    @cached_property
    def estimates(self) -> Any:
        """Memory estimates of any recipe over this teacher."""
        from dpdmd_pipeline.planning.memory import memory_model

        return memory_model(self.teacher, self.backbone)


class WrittenPrompts(NamedTuple):
    """Cleaned prompts on the disk."""

    counts: Counts
    rows: list[int]  # of the training prompts
    texts: str  # digest of all texts


def make_plan(pipeline: Any, catalog: Any) -> Plan | None:
    """Read the plan of a run from its pipeline and catalog; None if it has no stage with a cost of its own.

    Raises:
        ValueError, OSError: if an input cannot be read.
    """
    nodes = {node.name for node in pipeline.nodes}
    groups = [group for node, group in STUDENTS.items() if node in nodes]
    if not (nodes & COSTLY and set(catalog) >= READ):
        return None
    teacher, outputs = catalog.get("teacher"), pipeline.all_outputs()
    from_hub = hasattr(teacher, "load_configs")  # its weights need not be downloaded yet
    written = {"embeddings", "anchors", "images", "pictures"} & outputs
    if from_hub:  # weights of embedded teachers and students are small
        written |= WEIGHTS & outputs | ({"train_state"} if groups else set())
    prompts = _written_prompts(pipeline, catalog)
    export = tuple(option(catalog, "export", name) for name in ("formats", "dtype")) if "export" in outputs else None
    download = teacher.missing_bytes() if from_hub else 0
    folders = {name: Path(catalog.get(name)._filepath) for name in sorted(written)}
    plan = Plan(
        teacher=teacher.load_configs() if from_hub else teacher.load(),
        backbone=BackboneOptions.model_validate(catalog.get("params:backbone").load()),
        anchors=AnchorRecipe.model_validate(catalog.get("params:anchors").load()),
        trained={group: TrainOptions.model_validate(catalog.get(f"params:{group}").load()) for group in groups},
        train=TrainOptions.model_validate(catalog.get("params:train").load()),
        prompts=prompts.counts if prompts else _most_prompts(pipeline, catalog),
        drawn=_drawn(catalog, outputs) if "sample_images" in nodes else None,
        exported=export,
        download=download,
        is_pretrained=from_hub,
        folders=folders | ({"teacher": hub_cache()} if download else {}),
    )
    if groups and "anchors" not in outputs:
        _check_draws(plan, catalog)
    return plan if prompts is None else _with_reused(plan, catalog, prompts)


def _drawn(catalog: Any, outputs: set[str]) -> Drawn:
    """Pictures of the evaluation, by students of this run or by those on the disk."""
    from dpdmd_pipeline.backbones.student_file import load_header

    backbone = BackboneOptions.model_validate(catalog.get("params:backbone").load())
    evaluations = {"teacher": backbone.evaluations}
    for group, student in TRAINED.items():
        is_new = student in outputs
        header = None if is_new else load_header(catalog.get(student).load())
        evaluations[student] = header.num_steps if header else option(catalog, group, "num_steps")
    if start := option(catalog, "evaluate", "teacher_start"):
        start = TeacherStart.model_validate(start)
        remaining = evaluations["student_dmd"] - start.landing
        evaluations["started"] = remaining + start.evaluations(backbone.guidance_scale)
    facts = {name: option(catalog, "evaluate", name) for name in ("images_per_prompt", "seed")}
    return Drawn(facts, evaluations, option(catalog, "evaluate", "save_pictures"))


def _check_draws(plan: Plan, catalog: Any) -> None:
    """StageError if the anchors on the disk were made for a training that draws fewer samples."""
    anchors = _load_cache(catalog, "anchors", {})
    there = anchors and anchors.manifest.get("anchored_prompts")
    if there and plan.prompts and plan.train and there < plan.anchored[0]:
        draws = f"train.max_steps={plan.train.max_steps} x train.batch_size={plan.train.batch_size}"
        fact = f"the anchors are of {there} prompts, {draws} draws more: make them with the same --params"
        raise StageError(fact, stage="anchors")


def _written_prompts(pipeline: Any, catalog: Any) -> WrittenPrompts | None:
    """The cleaned prompts on the disk; None if this run writes others: a raw file is newer, or the options differ."""
    if not catalog.exists("prompts"):
        return None
    prompts, is_input = catalog.get("prompts").load(), "prompts" not in pipeline.all_outputs()
    if not is_input:
        sources = [catalog.get(name).load().path for name in ("raw_prompts", "raw_eval_prompts")]
        report = catalog.get("prompts_report").load() if catalog.exists("prompts_report") else {}
        if report.get("choice") != {name: option(catalog, "prompts", name) for name in CHOICE}:
            return None
        written = prompts.path.stat().st_mtime
        if any(path.is_file() and path.stat().st_mtime > written for path in sources):
            return None
    try:
        uses = [(record["train"], record["eval"]) for record in prompts]
        rows = [row for row, (trained, _) in enumerate(uses) if trained]
        counts = Counts(len(uses), len(rows), sum(evaluated for _, evaluated in uses))
        return WrittenPrompts(counts, rows, texts_digest(prompts))
    except (ValueError, OSError):
        if is_input:
            raise
        return None  # this run writes it anew


def _most_prompts(pipeline: Any, catalog: Any) -> Counts | None:
    """Upper bounds if the run cleans the raw files."""
    if "prompts" not in pipeline.all_outputs():
        return None
    trained, evaluated = (catalog.get(name).load() for name in ("raw_prompts", "raw_eval_prompts"))
    take, share = (option(catalog, "prompts", name) for name in ("take", "eval_share"))
    count = sum(bool(line.text.strip()) for line in trained.lines())
    count = count if take is None else min(take, count)
    others = sum(bool(line.text.strip()) for line in evaluated.lines()) if share is None else 0
    return Counts(count + others, count, others if share is None else math.ceil(share * count))


def _with_reused(plan: Plan, catalog: Any, prompts: WrittenPrompts) -> Plan:
    """Add the caches, checkpoints and students on the disk that this run reuses, without reading weights.

    The teacher's weights are not compared: a cache of another teacher with the same options counts as this run's.
    """
    from dpdmd_pipeline.backbones.student_file import load_finished

    settings = plan.backbone.model_dump(mode="json")
    facts = {name: settings[name] for name in ("family", "max_sequence_length", "dtype")} | {"texts": prompts.texts}
    embeddings = _load_cache(catalog, "embeddings", facts)
    if embeddings is None:
        return plan
    facts = {
        "options": plan.anchors.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
        "rows": fingerprint(prompts.rows),
        "embeddings": embeddings.fingerprint,
    }
    if plan.anchors.mode == "cached":
        facts["anchored_prompts"] = plan.anchored[0]
    anchors = _load_cache(catalog, "anchors", facts)
    # a cache of online anchors has no rows, so it counts as false
    made = [("family", None)] if anchors is None else anchors.manifest.get("backbone", {}).items()
    reused, states, finished = {"embeddings"}, {}, set()
    if all(settings[name] == value for name, value in made):
        reused.add("anchors")
        for group, options in plan.trained.items():
            identity = student_identity(options.recipe(), plan.backbone, anchors, prompts.rows)
            if "train_state" in plan.folders:
                states[group] = state_folder(plan.folders["train_state"], identity)
            folder = catalog.get(PUBLISHED[group]).load() if PUBLISHED[group] in catalog else None
            if folder and load_finished(folder, identity) is not None:
                finished.add(group)
    if plan.drawn and finished >= plan.trained.keys():  # the students' weights are not compared, either
        facts = {"embeddings": embeddings.fingerprint, "backbone": settings, **plan.drawn.facts}
        reused |= {"images"} if _load_cache(catalog, "images", facts) else set()
    return replace(plan, reused=frozenset(reused), states=states, finished=frozenset(finished))


def _load_cache(catalog: Any, name: str, facts: Mapping[str, Any]) -> Any | None:
    """A published cache whose manifest has these facts; None if there is none (its stage reports any damage)."""
    from kedro.io import DatasetError

    try:
        cache = catalog.get(name).load() if catalog.exists(name) else None
    except DatasetError:
        return None
    is_this_runs = cache is not None and all(cache.manifest.get(name) == value for name, value in facts.items())
    return cache if is_this_runs else None
