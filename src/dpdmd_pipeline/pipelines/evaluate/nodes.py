"""Nodes of the evaluate stage."""

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.pictures import (
    MODELS,
    draw_grid,
    picture_sets,
    pictures_by_seed,
    read_pictures,
    rows_of,
)
from dpdmd_pipeline.pipelines.evaluate.preflight import foreign_line

log = logging.getLogger(__name__)


def judged_prompts(prompts: Iterable[dict], options: EvaluateOptions) -> dict[int, str]:
    """Row and text of every evaluation prompt; depends on nothing trained, so that it refuses before training.

    Raises:
        ValueError: if there is none, or the judge does not know some of them.
    """
    chosen = {row: record["text"] for row, record in enumerate(prompts) if record["eval"]}
    if not chosen:
        raise ValueError("no evaluation prompt: name a file (raw_eval_prompts) or set prompts.eval_share")
    if options.judge == "shapes" and (line := foreign_line(chosen.values())):
        raise ValueError(line)
    return chosen


def say_what_is_missing(metric_weights: Path, shapes_clip: Path, options: EvaluateOptions) -> None:
    """Warn of metrics that lack their weights; depends on nothing drawn, so that there is time to fetch them.

    Raises:
        ValueError: for a metric that is not there.
    """
    from dpdmd_pipeline.pipelines.evaluate.scoring import asked_presets, make_settings, missing_weights

    for reason in missing_weights(asked_presets(options), make_settings(metric_weights, shapes_clip, options)).values():
        log.warning("%s", reason)


def score_images(
    images: Any,
    chosen: dict[int, str],
    score_state: Path,
    metric_weights: Path,
    shapes_clip: Path,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Everything that is measured of the three models, prompt by prompt too, and everything that is not."""
    from dpdmd_pipeline.metrics.correlation import rank_correlations
    from dpdmd_pipeline.pipelines.evaluate.scoring import KnownScores, asked_presets, make_settings, score_models
    from dpdmd_pipeline.scoring.gap import gap_notes, gaps_recovered
    from dpdmd_pipeline.scoring.table import as_record

    sets = picture_sets(images, chosen)
    known = KnownScores(score_state, images.fingerprint, make_settings(metric_weights, shapes_clip, options))
    scores = score_models(sets, asked_presets(options), known)
    attributes = {}
    if options.judge == "shapes":
        attributes = {name: count_attributes(images, sets[name]) for name in MODELS}
    return {
        "prompts": {str(row): text for row, text in chosen.items()},
        "models": {name: as_record(found) for name, found in scores.items()},
        "gaps": gaps_recovered(*(scores[name] for name in MODELS), options.seed),
        "gap_notes": gap_notes(*(scores[name] for name in MODELS)),
        "rank_correlation": rank_correlations([scores[name].per_prompt for name in MODELS], options.seed),
        "attributes": attributes,
    }


def count_attributes(images: Any, sets: Sequence[Any]) -> dict[str, dict[str, int]]:
    """How often one model's right pictures have each value of the attributes that the prompts leave free."""
    from dpdmd_pipeline.metrics.attributes import attribute_counts, mode_counts

    return attribute_counts(sum(mode_counts(read_pictures(images, one.rows) / 255, one.text) for one in sets))


def summarise(images: Any, scores: dict[str, Any], options: EvaluateOptions) -> dict[str, Any]:
    """The figures of the three models, and the share of DMD's loss that DP-DMD gets back, under the same names.

    Each says by the start of its folder's hash which model was measured: an export asks whether it is its own.
    """
    from dpdmd_pipeline.pipelines.evaluate.scoring import EXACT

    results = {name: _figures_of(scores["models"][name], options) for name in MODELS}
    for name, found in results.items():
        found["nfe"] = images.manifest["nfe"][name]
        found["model"] = images.manifest["models"][name][:16]
    gaps = dict(scores["gaps"])
    exact = EXACT["diversity"] if options.judge == "shapes" else {}
    recovered = {name: gaps.pop(full) for name, full in exact.items() if full in gaps}
    results["dp_dmd"] |= {"gap_recovered": recovered, "gaps": gaps, "gap_notes": scores["gap_notes"]}
    return {**results, "rank_correlation": scores["rank_correlation"]}


def _figures_of(record: dict[str, Any], options: EvaluateOptions) -> dict[str, Any]:
    """One model's figures: the exact ones by short names, their presets told once; the others by their full names."""
    from dpdmd_pipeline.pipelines.evaluate.scoring import EXACT

    figures = dict(record["figures"])
    n = {"prompts": record["prompts"], "per_prompt": options.images_per_prompt}
    found: dict[str, Any] = {"nfe": 0, "model": "", "n": n, "exact_presets": {}}
    for kind, names in EXACT.items():
        known = names if options.judge == "shapes" else {}
        taken = {name: figures.pop(full) for name, full in known.items() if full in figures}
        found[kind] = {name: {end: figure[end] for end in ("value", "low", "high")} for name, figure in taken.items()}
        found["exact_presets"] |= {names[name].rpartition(".")[0]: figure["preset"] for name, figure in taken.items()}
    faults = {kind: fault["count"] for kind, fault in record["faults"].items()}
    told = {name: record[name] for name in ("missing", "notes", "weights")}
    return {**found, "figures": figures, "faults": faults, **told}


def draw_grids(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> tuple[Any, Any, Any]:
    """One picture per model: a row per prompt, a column per seed, the same in all three."""
    rows, shown = rows_of(images), list(chosen)[: options.grid_prompts]
    return tuple(
        draw_grid(images, [rows[number, prompt][: options.grid_columns] for prompt in shown], options.grid_tile)
        for number in range(len(MODELS))
    )


def lay_out_pictures(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> dict[str, Any]:
    """By model and prompt, what reads the pictures by their seeds; nothing where they are not to be saved."""
    if not options.save_pictures:
        return {}
    rows = rows_of(images)
    return {
        name: {text: partial(pictures_by_seed, images, rows[number, row]) for row, text in chosen.items()}
        for number, name in enumerate(MODELS)
    }
