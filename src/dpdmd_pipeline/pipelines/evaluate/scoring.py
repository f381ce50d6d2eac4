"""Scores of the drawn pictures, one model and one metric at a time: what is known is not measured again."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.lineage import code_hash
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.libraries import versions
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.publishing import write_atomically
from dpdmd_pipeline.scoring.builders import GENEVAL
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.presets import choose
from dpdmd_pipeline.scoring.published import CLIP_SHAPES
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference, Scores
from dpdmd_pipeline.scoring.workers import workers

log = logging.getLogger(__name__)

SCHEMA = 1
# A score is only taken up by the code that measured it. Without the list of presets: one more makes no other stale,
# and a preset's protocol is part of what it is known by.
CODE = (
    *(
        f"metrics/{name}.py"
        for name in (
            "alignment",
            "distribution",
            "diversity",
            "embedders",
            "features",
            "measures",
            "modes",
            "passes",
            "quality",
            "questions",
            "shapes",
            "summary",
        )
    ),
    *(
        f"scoring/{name}.py"
        for name in (
            "compare",
            "decode",
            "duplicates",
            "notes",
            "rows",
            "score",
            "scores",
            "sets",
            "workers",
        )
    ),
    "shapes/reader.py",
    "shapes/world.py",
)

# Shared features are only taken up by the code that computes them.
FEATURES = ("metrics/alignment.py", "metrics/embedders.py", "metrics/features.py", "metrics/passes.py")

# What the exact reader of the embedded world measures: names in metrics.json to full names.
EXACT = {
    "quality": {name: f"quality.shapes.{name}" for name in ("valid", "aligned", "residual")},
    "diversity": {
        **{name: f"diversity.shapes.{name}" for name in ("effective_modes", "coverage", "entropy")},
        "pairwise_distance": "diversity.pixels.mean_distance",
    },
}
_EXACT_PRESETS = ("quality.shapes", "diversity.shapes", "diversity.pixels")


def asked_presets(options: EvaluateOptions) -> list[Preset]:
    """What is to be measured, the judge's own metrics first.

    Raises:
        ValueError: for a name that is not there.
    """
    exact = _exact(options)
    return [*exact, *(preset for preset in choose(",".join(options.by)) if preset not in exact)]


def exact_presets(options: EvaluateOptions) -> dict[str, str]:
    """Full name to protocol of the judge's own metrics."""
    return {preset.full_name: preset.protocol for preset in _exact(options)}


def _exact(options: EvaluateOptions) -> list[Preset]:
    return choose(",".join(_EXACT_PRESETS)) if options.judge == "shapes" else []


def make_settings(metric_weights: Path, shapes_clip: Path, options: EvaluateOptions) -> Settings:
    """How the pictures of a run are judged."""
    from dpdmd_pipeline.backbones.options import resolve_device
    from dpdmd_pipeline.metrics.passes import Passes
    from dpdmd_pipeline.scoring.texts import read_parts

    weights = _from_here(metric_weights)
    records = weights / GENEVAL / "evaluation_metadata.jsonl"
    return Settings(
        weights=weights,
        passes=Passes(resolve_device(options.device).type, options.metric_batch_size),
        processes=options.metric_processes,
        seed=options.seed,
        parts=read_parts(records) if records.is_file() else {},
        elsewhere={CLIP_SHAPES.folder: _from_here(shapes_clip)},
    )


def _from_here(folder: Path) -> Path:
    """As seen from the working folder where that is above it: what is missing is written into files of git."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


def missing_weights(presets: Sequence[Preset], settings: Settings) -> dict[str, str]:
    """Metrics that will not be measured, with the reason."""
    found = {}
    for preset in presets:
        try:
            preset.require(settings)
        except UnavailableError as error:
            found[preset.full_name] = str(error)
    return found


class KnownScores:
    """Scores of earlier runs, a file each.

    Args:
        folder: of the files, and of features that metrics share.
        pictures: fingerprint of the drawn pictures.
        settings: how they are judged.
    """

    def __init__(self, folder: Path, pictures: str, settings: Settings) -> None:
        self.folder = folder
        # Features of all models by the same libraries: another preprocessing in one would pass for their difference.
        libraries = list(versions().values())
        features = fingerprint(code_hash(*FEATURES), libraries, pictures)
        self.settings = replace(settings, features=folder / f"features_{features[:16]}")
        self._common = (SCHEMA, code_hash(*CODE), libraries, pictures, settings.seed, settings.passes.device)

    def path(self, model: str, preset: Preset) -> Path:
        """Where the scores of one model by one preset are kept; its name tells all that decides them."""
        parts = self.settings.parts if preset.name == "geneval_vqa" else {}
        weights = preset.digests(self.settings)
        key = fingerprint(*self._common, model, preset.full_name, preset.protocol, weights, parts)
        return self.folder / f"{preset.full_name}-{model}-{key[:16]}.json"

    def load(self, path: Path) -> dict[str, Any] | None:
        """A record of `keep`; None if there is none, or not a whole one."""
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None

    def drop_other_features(self) -> None:
        """Delete the features of earlier pictures, code and libraries: they are large, and nothing asks for them."""
        for other in self.folder.glob("features_*"):
            if other != self.settings.features:
                shutil.rmtree(other, ignore_errors=True)

    def keep(self, path: Path, record: dict[str, Any]) -> None:
        write_atomically(path, lambda temporary: temporary.write_text(json.dumps(record)))


def score_models(sets: Mapping[str, Sequence[Any]], presets: Sequence[Preset], known: KnownScores) -> dict[str, Scores]:
    """All presets of all models. Distributions are compared with the teacher's pictures, so it has none itself.

    Args:
        sets: of each model, the teacher's first.
        presets: what to measure.
        known: earlier scores, and how to measure.
    """
    known.drop_other_features()
    teacher = next(iter(sets))
    found = {name: Scores(len(pictures), sum(map(len, pictures))) for name, pictures in sets.items()}
    with workers(known.settings) as pool:
        for preset in presets:
            reference = Reference(sets[teacher])
            for name, pictures in sets.items():
                if preset.axis != "distribution" or name != teacher:
                    found[name].join(_scored(name, pictures, preset, reference, known, pool))
    return found


def _scored(
    model: str, pictures: Sequence[Any], preset: Preset, reference: Reference, known: KnownScores, pool: Any
) -> Scores:
    """Scores of one model by one preset; with the teacher's come the near-duplicates' threshold for all."""
    if missing_weights([preset], known.settings):
        return score(pictures, [preset], known.settings, reference, pool)  # which says what is missing
    path, begun = known.path(model, preset), time.monotonic()
    record = known.load(path)
    if record is None:
        scores = score(pictures, [preset], known.settings, reference, pool)
        record = _as_record(scores, reference)
        if scores.figures:
            known.keep(path, record)
        log.info("%s of %s: measured in %.1f s", preset.full_name, model, time.monotonic() - begun)
    else:
        log.info("%s of %s: reused", preset.full_name, model)
    reference.duplicates.update({name: tuple(found) for name, found in record.pop("duplicates").items()})
    return Scores(**record)


def _as_record(scores: Scores, reference: Reference) -> dict[str, Any]:
    kept = ("prompts", "pictures", "figures", "per_prompt", "missing", "faults", "notes", "usable", "weights")
    return {**{name: getattr(scores, name) for name in kept}, "duplicates": reference.duplicates}
