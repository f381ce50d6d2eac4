"""Reuse: caches, checkpoints and students on the disk that belong to a run, found without reading weights.

The teacher's weights are not compared here: a cache of another teacher with the same options counts as this run's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.planning.identity import code_hash, texts_digest
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe, Recipe


class WrittenPrompts(NamedTuple):
    """Cleaned prompts on the disk.

    Attributes:
        total: number of prompts.
        rows: rows of the training prompts.
        texts: digest of all texts.
    """

    total: int
    rows: list[int]
    texts: str


def read_prompts(prompts: Iterable[dict]) -> WrittenPrompts:
    """Count and hash the prompts in one pass."""
    total, rows = 0, []

    def counted() -> Iterator[dict]:
        nonlocal total
        for record in prompts:
            if record["train"]:
                rows.append(total)
            total += 1
            yield record

    texts = texts_digest(counted())
    return WrittenPrompts(total, rows, texts)


def reusable_caches(
    caches: Mapping[str, Any], prompts: WrittenPrompts, backbone: BackboneOptions, anchors: AnchorRecipe
) -> dict[str, Any]:
    """The published caches that belong to the run.

    Args:
        caches: `embeddings` and `anchors`, None if missing.
        prompts, backbone, anchors: of the run.
    """
    settings = backbone.model_dump(mode="json")
    reusable: dict[str, Any] = {}
    if (embeddings := caches.get("embeddings")) is not None:
        names = ("family", "max_sequence_length", "dtype")
        if _records(embeddings, {"texts": prompts.texts, **{name: settings[name] for name in names}}):
            reusable["embeddings"] = embeddings
    if (cache := caches.get("anchors")) is not None and "embeddings" in reusable:
        facts = {
            "options": anchors.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
            "rows": fingerprint(prompts.rows),
            "embeddings": reusable["embeddings"].fingerprint,
            "backbone": {name: settings[name] for name in cache.manifest.get("backbone", {}) if name in settings},
        }
        if _records(cache, facts):
            reusable["anchors"] = cache
    return reusable


def _records(cache: Any, facts: Mapping[str, Any]) -> bool:
    """True if the manifest of a cache holds these facts."""
    return all(cache.manifest.get(name) == value for name, value in facts.items())


def student_identity(recipe: Recipe, backbone: BackboneOptions, anchors: Any, rows: list[int]) -> str:
    """Identity of a student: recipe, teacher settings, anchors, training prompts and code, hexadecimal."""
    unread = {"lora"} if recipe.roles == "full" else set()
    unread |= {"watch"} if recipe.watch.keep == "last" else set()
    parts = (
        recipe.model_dump(mode="json", exclude=unread),
        backbone.model_dump(mode="json"),
        anchors.fingerprint,
        rows,
    )
    return fingerprint(*parts, code_hash("pipelines.train.setup", f"backbones.{backbone.family}"))


def state_folder(train_state: Path, identity: str) -> Path:
    """Folder of the checkpoints of one student, among those of all."""
    return train_state / identity[:16]


def finished_students(folders: Mapping[str, Path | None], identities: Mapping[str, str]) -> Iterator[str]:
    """Names of the students whose published folder has the identity of this run."""
    from dpdmd_pipeline.backbones.student_file import load_finished

    for name, identity in identities.items():
        folder = folders.get(name)
        if folder is not None and load_finished(folder, identity) is not None:
            yield name


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder; 0 if it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
