"""What of a run's caches and states is on the disk already, as far as that is known before a weight is read.

The teacher's weights are not: a cache of another teacher with the same options is taken for this run's.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.planning.identity import code_hash, texts_digest
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import NOT_IN_THE_RESULT, AnchorRecipe, Recipe


class Known(NamedTuple):
    """Prompts that are written down.

    Attributes:
        total: how many there are.
        rows: of those trained on.
        texts: digest of all.
    """

    total: int
    rows: list[int]
    texts: str


def read_prompts(prompts: Iterable[dict]) -> Known:
    """Count and hash the prompts in one pass."""
    total, rows = 0, []

    def noted() -> Iterable[dict]:
        nonlocal total
        for record in prompts:
            if record["train"]:
                rows.append(total)
            total += 1
            yield record

    texts = texts_digest(noted())
    return Known(total, rows, texts)


def own_caches(
    caches: Mapping[str, Any], prompts: Known, backbone: BackboneOptions, anchors: AnchorRecipe
) -> dict[str, Any]:
    """Those of the published caches that hold what the options and the prompts ask for: they are not made again.

    Args:
        caches: `embeddings` and `anchors`, as far as they are there and whole.
        prompts, backbone, anchors: of the run.
    """
    settings = backbone.model_dump(mode="json")
    own: dict[str, Any] = {}
    if (embeddings := caches.get("embeddings")) is not None:
        names = ("family", "max_sequence_length", "dtype")
        if _says(embeddings, {"texts": prompts.texts, **{name: settings[name] for name in names}}):
            own["embeddings"] = embeddings
    if (cache := caches.get("anchors")) is not None and "embeddings" in own:
        facts = {
            "options": anchors.model_dump(mode="json", exclude=NOT_IN_THE_RESULT),
            "rows": fingerprint(prompts.rows),
            "embeddings": own["embeddings"].fingerprint,
            "backbone": {name: settings[name] for name in cache.manifest.get("backbone", {}) if name in settings},
        }
        if _says(cache, facts):
            own["anchors"] = cache
    return own


def _says(cache: Any, facts: Mapping[str, Any]) -> bool:
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


def state_folders(
    train_state: Path, trained: Mapping[str, TrainOptions], backbone: BackboneOptions, anchors: Any, rows: list[int]
) -> dict[str, Path]:
    """Where each student's states lie, by its group.

    Args:
        train_state: folder of all states.
        trained: options of each student.
        backbone, anchors, rows: what they learn from.
    """
    return {
        group: state_folder(train_state, student_identity(options.recipe(), backbone, anchors, rows))
        for group, options in trained.items()
    }


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder; 0 where there is none."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
