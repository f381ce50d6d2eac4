"""The plan of a Kedro run: what it makes, from what, and what it can reuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.reuse import WrittenPrompts, finished_students, read_prompts, reusable_caches, state_folder
from dpdmd_pipeline.planning.reuse import student_identity as identity_of
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

STUDENTS = {"train_dmd": "train_dmd", "train_student": "train"}  # node -> parameter group


@dataclass(frozen=True)
class Plan:
    """What a run makes.

    Attributes:
        teacher: folder of the teacher; its configs are enough.
        backbone, anchors: options.
        trained: parameter group to the options of each student.
        prompts: number of all prompts and of training prompts; None if unknown.
        folders: `embeddings`, `anchors` and `train_state` to their folders, if the run writes them.
        reused: published caches that belong to this run.
        states: parameter group to the folder of the student's checkpoints, if known.
        finished: parameter groups of students that are published already.
    """

    teacher: Path
    backbone: BackboneOptions
    anchors: AnchorRecipe
    trained: Mapping[str, TrainOptions]
    prompts: tuple[int, int] | None = None
    folders: Mapping[str, Path] = field(default_factory=dict)
    reused: frozenset[str] = frozenset()
    states: Mapping[str, Path] = field(default_factory=dict)
    finished: frozenset[str] = frozenset()

    @cached_property
    def model(self) -> Any:
        """The teacher's adapter.

        Raises:
            ValueError, OSError: if the folder does not fit the options.
        """
        return self.backbone.load(self.teacher, "cpu")

    @cached_property
    def estimates(self) -> Any:
        """Memory estimates of any recipe over this teacher."""
        from dpdmd_pipeline.planning.gpu import memory_model

        return memory_model(self.teacher, self.backbone)


def make_plan(pipeline: Any, catalog: Any) -> Plan | None:
    """Read the plan of a run from its pipeline and catalog; None if it neither makes anchors nor trains a student.

    Raises:
        ValueError, OSError: if an input cannot be read.
    """
    nodes = {node.name for node in pipeline.nodes}
    groups = [group for node, group in STUDENTS.items() if node in nodes]
    if not (groups or "make_anchors" in nodes) or "teacher" not in catalog:
        return None
    teacher = catalog.get("teacher")
    from_hub = hasattr(teacher, "load_configs")  # its weights need not be downloaded yet
    folder = teacher.load_configs() if from_hub else teacher.load()
    prompts = _written_prompts(pipeline, catalog)
    plan = Plan(
        teacher=folder,
        backbone=BackboneOptions.model_validate(catalog.get("params:backbone").load()),
        anchors=AnchorRecipe.model_validate(catalog.get("params:anchors").load()),
        trained={group: TrainOptions.model_validate(catalog.get(f"params:{group}").load()) for group in groups},
        prompts=_count_prompts(pipeline, catalog, prompts),
        folders=_output_folders(pipeline, catalog, with_states=from_hub),
    )
    return plan if prompts is None else _with_reused(plan, catalog, prompts)


def _written_prompts(pipeline: Any, catalog: Any) -> WrittenPrompts | None:
    """The cleaned prompts on the disk; None if this run writes others, because a raw file is newer."""
    if not catalog.exists("prompts"):
        return None
    prompts = catalog.get("prompts").load()
    if "prompts" not in pipeline.all_outputs():
        return read_prompts(prompts)
    sources = [catalog.get(name).load().path for name in ("raw_prompts", "raw_eval_prompts")]
    written = prompts.path.stat().st_mtime
    if any(path.is_file() and path.stat().st_mtime > written for path in sources):
        return None
    try:
        return read_prompts(prompts)
    except (ValueError, OSError):  # this run writes it anew
        return None


def _with_reused(plan: Plan, catalog: Any, prompts: WrittenPrompts) -> Plan:
    """Add what this run reuses."""
    caches = {name: _load_cache(catalog, name) for name in ("embeddings", "anchors")}
    reused = reusable_caches(caches, prompts, plan.backbone, plan.anchors)
    if "anchors" not in reused:
        return replace(plan, reused=frozenset(reused))
    identities = {
        group: identity_of(options.recipe(), plan.backbone, reused["anchors"], prompts.rows)
        for group, options in plan.trained.items()
    }
    states = {}
    if "train_state" in plan.folders:
        folder = plan.folders["train_state"]
        states = {group: state_folder(folder, identity) for group, identity in identities.items()}
    published = {"train": "finished_student", "train_dmd": "finished_student_dmd"}
    folders = {group: catalog.get(published[group]).load() for group in identities if published[group] in catalog}
    finished = finished_students(folders, identities)
    return replace(plan, reused=frozenset(reused), states=states, finished=frozenset(finished))


def _load_cache(catalog: Any, name: str) -> Any | None:
    """A published cache; None if it is missing or damaged (the stage that writes it reports the damage)."""
    from kedro.io import DatasetError

    try:
        return catalog.get(name).load() if catalog.exists(name) else None
    except DatasetError:
        return None


def _count_prompts(pipeline: Any, catalog: Any, prompts: WrittenPrompts | None) -> tuple[int, int] | None:
    """Number of all prompts and of training prompts; an upper bound if the run cleans the raw files."""
    if "prompts" not in pipeline.all_outputs():
        return None if prompts is None else (prompts.total, len(prompts.rows))
    trained = _count_lines(catalog.get("raw_prompts").load())
    evaluated = catalog.get("raw_eval_prompts").load()
    return trained + (_count_lines(evaluated) if evaluated.path.is_file() else 0), trained


def _count_lines(prompts: Any) -> int:
    return sum(1 for line in prompts.lines() if line.text.strip())


def _output_folders(pipeline: Any, catalog: Any, *, with_states: bool) -> dict[str, Path]:
    """Folders of large outputs; checkpoints of embedded students are small."""
    outputs = pipeline.all_outputs()
    names = [name for name in ("embeddings", "anchors") if name in outputs]
    if with_states and outputs & {"student", "student_dmd"}:
        names.append("train_state")
    return {name: Path(catalog.get(name)._filepath) for name in names}
