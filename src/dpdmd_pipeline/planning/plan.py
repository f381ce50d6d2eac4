"""The plan of a Kedro run: its inputs, options and outputs, and the caches and students that it can reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.planning.cost import anchored_prompts
from dpdmd_pipeline.planning.identity import state_folder, student_identity, texts_digest
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe

STUDENTS = {"train_dmd": "train_dmd", "train_student": "train"}  # node -> parameter group
PUBLISHED = {"train_dmd": "finished_student_dmd", "train": "finished_student"}  # parameter group -> dataset


@dataclass(frozen=True)
class Plan:
    """Inputs, options and outputs of a run. Students go by their parameter groups."""

    teacher: Path  # folder; its configs are enough
    backbone: BackboneOptions
    anchors: AnchorRecipe
    trained: Mapping[str, TrainOptions]
    prompts: tuple[int, int] | None = None  # number of all prompts and of training prompts, if known
    folders: Mapping[str, Path] = field(default_factory=dict)  # of embeddings, anchors and train_state, if written
    reused: frozenset[str] = frozenset()  # published caches that belong to this run
    states: Mapping[str, Path] = field(default_factory=dict)  # folders of the students' checkpoints, if known
    finished: frozenset[str] = frozenset()  # students that are published already
    train: TrainOptions | None = None  # of the students that draw from the anchors; None: of any number of samples

    @property
    def anchored(self) -> tuple[int, int]:
        """Prompts in the cache of anchors, and anchors of each; the prompts must be known."""
        _, trained = self.prompts
        return anchored_prompts(trained, self.anchors, self.train)

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

    total: int
    rows: list[int]  # of the training prompts
    texts: str  # digest of all texts


def make_plan(pipeline: Any, catalog: Any) -> Plan | None:
    """Read the plan of a run from its pipeline and catalog; None if it neither makes anchors nor trains a student.

    Raises:
        ValueError, OSError: if an input cannot be read.
    """
    nodes = {node.name for node in pipeline.nodes}
    groups = [group for node, group in STUDENTS.items() if node in nodes]
    if not (groups or "make_anchors" in nodes) or "teacher" not in catalog:
        return None
    teacher, outputs = catalog.get("teacher"), pipeline.all_outputs()
    from_hub = hasattr(teacher, "load_configs")  # its weights need not be downloaded yet
    written = {"embeddings", "anchors"} & outputs
    if from_hub and outputs & {"student", "student_dmd"}:  # checkpoints of embedded students are small
        written.add("train_state")
    prompts = _written_prompts(pipeline, catalog)
    train = catalog.get("params:train").load() if "params:train" in catalog else None
    plan = Plan(
        teacher=teacher.load_configs() if from_hub else teacher.load(),
        backbone=BackboneOptions.model_validate(catalog.get("params:backbone").load()),
        anchors=AnchorRecipe.model_validate(catalog.get("params:anchors").load()),
        trained={group: TrainOptions.model_validate(catalog.get(f"params:{group}").load()) for group in groups},
        train=train and TrainOptions.model_validate(train),
        prompts=(prompts.total, len(prompts.rows)) if prompts else _most_prompts(pipeline, catalog),
        folders={name: Path(catalog.get(name)._filepath) for name in sorted(written)},
    )
    if groups and "anchors" not in outputs:
        _check_draws(plan, catalog)
    return plan if prompts is None else _with_reused(plan, catalog, prompts)


def _check_draws(plan: Plan, catalog: Any) -> None:
    """StageError if the anchors on the disk were made for a training that draws fewer samples."""
    anchors = _load_cache(catalog, "anchors", {})
    there = anchors and anchors.manifest.get("anchored_prompts")
    if there and plan.prompts and plan.train and there < plan.anchored[0]:
        draws = f"train.max_steps={plan.train.max_steps} x train.batch_size={plan.train.batch_size}"
        fact = f"the anchors are of {there} prompts, {draws} draws more: make them with the same --params"
        raise StageError(fact, stage="anchors")


def _written_prompts(pipeline: Any, catalog: Any) -> WrittenPrompts | None:
    """The cleaned prompts on the disk; None if this run writes others, because a raw file is newer."""
    if not catalog.exists("prompts"):
        return None
    prompts, is_input = catalog.get("prompts").load(), "prompts" not in pipeline.all_outputs()
    if not is_input:
        sources = [catalog.get(name).load().path for name in ("raw_prompts", "raw_eval_prompts")]
        written = prompts.path.stat().st_mtime
        if any(path.is_file() and path.stat().st_mtime > written for path in sources):
            return None
    try:
        is_trained = [record["train"] for record in prompts]
        rows = [row for row, trained in enumerate(is_trained) if trained]
        return WrittenPrompts(len(is_trained), rows, texts_digest(prompts))
    except (ValueError, OSError):
        if is_input:
            raise
        return None  # this run writes it anew


def _most_prompts(pipeline: Any, catalog: Any) -> tuple[int, int] | None:
    """Upper bounds of all prompts and of training prompts if the run cleans the raw files."""
    if "prompts" not in pipeline.all_outputs():
        return None
    trained, evaluated = (catalog.get(name).load() for name in ("raw_prompts", "raw_eval_prompts"))
    count = sum(bool(line.text.strip()) for line in trained.lines())
    return count + (sum(1 for _ in evaluated.lines()) if evaluated.path.is_file() else 0), count


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
    # Online anchors are a cache without rows.
    if anchors is None or any(settings[name] != value for name, value in anchors.manifest.get("backbone", {}).items()):
        return replace(plan, reused=frozenset({"embeddings"}))
    states, finished = {}, set()
    for group, options in plan.trained.items():
        identity = student_identity(options.recipe(), plan.backbone, anchors, prompts.rows)
        if "train_state" in plan.folders:
            states[group] = state_folder(plan.folders["train_state"], identity)
        folder = catalog.get(PUBLISHED[group]).load() if PUBLISHED[group] in catalog else None
        if folder and load_finished(folder, identity) is not None:
            finished.add(group)
    return replace(plan, reused=frozenset({"embeddings", "anchors"}), states=states, finished=frozenset(finished))


def _load_cache(catalog: Any, name: str, facts: Mapping[str, Any]) -> Any | None:
    """A published cache whose manifest has these facts; None if there is none (its stage reports any damage)."""
    from kedro.io import DatasetError

    try:
        cache = catalog.get(name).load() if catalog.exists(name) else None
    except DatasetError:
        return None
    is_this_runs = cache is not None and all(cache.manifest.get(name) == value for name, value in facts.items())
    return cache if is_this_runs else None
