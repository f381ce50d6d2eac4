"""Score the drawn pictures, one model and one metric at a time; cached scores are not measured again."""

import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.metrics.libraries import versions
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.planning.identity import code_hash
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
EXACT_PRESETS = "quality.shapes,diversity.shapes,diversity.pixels"


def requested_presets(options: EvaluateOptions) -> list[Preset]:
    """Metrics of a run, the judge's own first."""
    exact = choose(EXACT_PRESETS) if options.judge == "shapes" else []
    return [*exact, *(preset for preset in choose(",".join(options.by)) if preset not in exact)]


def make_settings(metric_weights: Path, shapes_clip: Path, options: EvaluateOptions) -> Settings:
    from dpdmd_pipeline.backbones.options import resolve_device
    from dpdmd_pipeline.metrics.passes import Passes
    from dpdmd_pipeline.scoring.texts import read_parts

    weights = _relative(metric_weights)
    records = weights / GENEVAL / "evaluation_metadata.jsonl"
    return Settings(
        weights=weights,
        passes=Passes(resolve_device(options.device).type, options.metric_batch_size),
        processes=options.metric_processes,
        seed=options.seed,
        parts=read_parts(records) if records.is_file() else {},
        elsewhere={CLIP_SHAPES.folder: _relative(shapes_clip)},
    )


def _relative(folder: Path) -> Path:
    """Path relative to the working folder if it lies inside: messages with it are written into files of git."""
    return folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder


class ScoreCache:
    """Scores of earlier runs, one file per model and metric, and the features that metrics share.

    Args:
        pictures: fingerprint of the drawn pictures.
    """

    def __init__(self, folder: Path, pictures: str, settings: Settings) -> None:
        self.folder = folder
        # The features of all models need the same libraries: else a change of preprocessing looks like a difference.
        libraries = list(versions().values())
        code = code_hash("metrics.embedders", "metrics.features", "metrics.passes")
        features = fingerprint(code, libraries, pictures)
        self.settings = replace(settings, features=folder / f"features_{features[:16]}")
        code = code_hash("scoring.score", "scoring.builders")
        self._common = (SCHEMA, code, libraries, pictures, settings.seed, settings.passes.device)

    def path(self, model: str, preset: Preset) -> Path:
        """File of one model's scores by one preset; its name hashes everything that decides them."""
        parts = self.settings.parts if preset.name == "geneval_vqa" else {}
        weights = preset.digests(self.settings)
        key = fingerprint(*self._common, model, preset.full_name, preset.protocol, weights, parts)
        return self.folder / f"{preset.full_name}-{model}-{key[:16]}.json"


def score_models(sets: Mapping[str, Sequence[Any]], presets: Sequence[Preset], cache: ScoreCache) -> dict[str, Scores]:
    """Score all models by all presets.

    Distributions are compared with the teacher's pictures, so the teacher has no score of them.

    Args:
        sets: sets of pictures by model, the teacher's first.
    """
    for folder in cache.folder.glob("features_*"):
        if folder != cache.settings.features:  # of earlier pictures, code or libraries: large, and no longer used
            shutil.rmtree(folder, ignore_errors=True)
    teacher = next(iter(sets))
    scores = {name: Scores(len(pictures), sum(map(len, pictures))) for name, pictures in sets.items()}
    with workers(cache.settings) as pool:
        for preset in presets:
            reference = Reference(sets[teacher])
            for name, pictures in sets.items():
                if preset.axis != "distribution" or name != teacher:
                    scores[name].join(_score_model(name, pictures, preset, reference, cache, pool))
    return scores


def _score_model(
    model: str, pictures: Sequence[Any], preset: Preset, reference: Reference, cache: ScoreCache, pool: Any
) -> Scores:
    """Load or measure one model's scores by one preset; the teacher's set the threshold of near-duplicates for all."""
    if preset.lack(cache.settings):
        return score(pictures, [preset], cache.settings, reference, pool)  # a record of the reason only
    path, start = cache.path(model, preset), time.monotonic()
    record = None
    with suppress(FileNotFoundError, ValueError):  # it may be incomplete
        record = json.loads(path.read_bytes())
    if record is None:
        scores = score(pictures, [preset], cache.settings, reference, pool)
        record = {name: value for name, value in vars(scores).items() if not name.startswith("_")}
        record["duplicates"] = reference.duplicates
        if scores.figures:
            text = json.dumps(record)
            write_atomically(path, lambda temporary: temporary.write_text(text))
        log.info("%s of %s: measured in %.1f s", preset.full_name, model, time.monotonic() - start)
    else:
        log.info("%s of %s: reused", preset.full_name, model)
    reference.duplicates.update({name: tuple(pair) for name, pair in record.pop("duplicates").items()})
    return Scores(**record)
