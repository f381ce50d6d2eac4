"""Nodes of the evaluate stage."""

import logging
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions
from dpdmd_pipeline.pipelines.evaluate.pictures import MODELS, cache_rows, draw_grid, picture_sets, pictures_by_seed
from dpdmd_pipeline.planning.judging import foreign_line
from dpdmd_pipeline.wording import made

log = logging.getLogger(__name__)

# Figures of the exact reader of the embedded world: names in metrics.json to full names.
EXACT = {
    "quality": {name: f"quality.shapes.{name}" for name in ("valid", "aligned", "residual")},
    "diversity": {
        **{name: f"diversity.shapes.{name}" for name in ("effective_modes", "coverage", "entropy")},
        "pairwise_distance": "diversity.pixels.mean_distance",
    },
}


def judged_prompts(prompts: Iterable[dict], options: EvaluateOptions) -> dict[int, str]:
    """Map the row of every evaluation prompt to its text; needs no model, so it can fail before training."""
    chosen = {row: record["text"] for row, record in enumerate(prompts) if record["eval"]}
    if not chosen:
        raise ValueError("no evaluation prompts: set raw_eval_prompts to a file, or set prompts.eval_share")
    if options.judge == "shapes" and (line := foreign_line(chosen.values())):
        raise ValueError(line)
    return chosen


def warn_about_missing_weights(metric_weights: Path, shapes_clip: Path, options: EvaluateOptions) -> None:
    """Warn about metrics without weights; needs no pictures, so there is time to fetch the weights."""
    from dpdmd_pipeline.pipelines.evaluate.scoring import make_settings, requested_presets

    settings = make_settings(metric_weights, shapes_clip, options)
    for lack in filter(None, (preset.lack(settings) for preset in requested_presets(options))):
        log.warning("%s", lack)


def score_images(
    images: Any,
    chosen: dict[int, str],
    score_state: Path,
    metric_weights: Path,
    shapes_clip: Path,
    options: EvaluateOptions,
) -> dict[str, Any]:
    """Score the pictures of all models, also prompt by prompt, and list what was not measured."""
    from dpdmd_pipeline.metrics.correlation import rank_correlations
    from dpdmd_pipeline.metrics.shapes import attribute_counts, mode_counts
    from dpdmd_pipeline.pipelines.evaluate.scoring import ScoreCache, make_settings, requested_presets, score_models
    from dpdmd_pipeline.scoring.gap import gaps_recovered
    from dpdmd_pipeline.scoring.table import as_record

    sets = picture_sets(images, chosen)
    pictures = len(chosen) * options.images_per_prompt
    made.info("%d pictures by each of %d models", pictures, len(sets))
    cache = ScoreCache(score_state, images.fingerprint, make_settings(metric_weights, shapes_clip, options))
    scores = score_models(sets, requested_presets(options), cache)
    models = [scores[name] for name in MODELS]
    gaps, gap_notes = gaps_recovered(*models, options.seed)
    attributes = {}  # counts of the values that no prompt names, over the correct pictures
    if options.judge == "shapes":
        for name in MODELS:
            counts = [mode_counts(images.rows(one.rows)["image"] / 255, one.text) for one in sets[name]]
            attributes[name] = attribute_counts(sum(counts))
    return {
        "prompts": {str(row): text for row, text in chosen.items()},
        "models": {name: as_record(of_model) for name, of_model in scores.items()},
        "gaps": gaps,
        "gap_notes": gap_notes,
        "rank_correlation": rank_correlations([of_model.per_prompt for of_model in models], options.seed),
        "attributes": attributes,
    }


def make_metrics(images: Any, scores: dict[str, Any], options: EvaluateOptions) -> dict[str, Any]:
    """Figures of the three models, and the share of DMD's lost diversity that DP-DMD recovers.

    `model` is the start of each folder's hash, `student` the identity in a student's header: export and report compare
    them with the student that they get.
    """
    exact = EXACT if options.judge == "shapes" else dict.fromkeys(EXACT, {})
    metrics = {name: _model_metrics(name, images.manifest, scores, exact) for name in images.manifest["models"]}
    for model in metrics.values():
        model["n"]["per_prompt"] = options.images_per_prompt
    gaps = dict(scores["gaps"])
    recovered = _pop(gaps, exact["diversity"])
    metrics["dp_dmd"] |= {"gap_recovered": recovered, "gaps": gaps, "gap_notes": scores["gap_notes"]}
    return {**metrics, "rank_correlation": scores["rank_correlation"]}


def _pop(figures: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """Remove figures; returns them by their short names."""
    return {name: figures.pop(full_name) for name, full_name in names.items() if full_name in figures}


def _model_metrics(
    model: str, manifest: dict[str, Any], scores: dict[str, Any], exact: dict[str, dict[str, str]]
) -> dict[str, Any]:
    """One model's figures: exact figures by short names, their presets once per model; all others by full names."""
    record = scores["models"][model]
    figures, presets, by_kind = dict(record["figures"]), {}, {}
    for kind, names in exact.items():
        moved = _pop(figures, names)
        by_kind[kind] = {name: {key: figure[key] for key in ("value", "low", "high")} for name, figure in moved.items()}
        presets |= {names[name].rpartition(".")[0]: figure["preset"] for name, figure in moved.items()}
    return {
        "nfe": manifest["nfe"][model],
        "model": manifest["models"][model][:16],
        "student": manifest.get("students", {}).get(model),
        "n": {"prompts": record["prompts"]},
        "exact_presets": presets,
        **by_kind,
        "figures": figures,
        "faults": {kind: fault["count"] for kind, fault in record["faults"].items()},
        **{name: record[name] for name in ("missing", "notes", "weights")},
    }


def make_summary(metrics: dict[str, Any]) -> dict[str, dict[str, float]]:
    """At most ten numbers of metrics.json, for `dvc metrics diff` and `dvc exp show`.

    Returns:
        For each model `aligned` and effective `modes` by the exact reader, and network `evaluations` per picture; for
        DP-DMD also `gap`, the share of the lost diversity that it recovers. Without the reader, the first diversity
        metric that all models have replaces `modes`, under its full name. Numbers that do not exist are left out.
    """
    diversity = {model: _diversity(metrics[model]) for model in MODELS}
    common = [name for name in diversity["dp_dmd"] if all(name in values for values in diversity.values())][:1]
    summary = {}
    for model in MODELS:
        summary[model] = _values({"aligned": metrics[model]["quality"].get("aligned")})
        summary[model] |= {name: diversity[model][name] for name in common}
        summary[model]["evaluations"] = metrics[model]["nfe"]
    ours = metrics["dp_dmd"]
    gaps = {"modes": ours["gap_recovered"].get("effective_modes"), **ours["gaps"]}
    if common:
        summary["dp_dmd"] |= _values({"gap": gaps.get(common[0])})
    return summary


def _diversity(metrics: dict[str, Any]) -> dict[str, float]:
    """One model's measured diversity: the exact reader's modes first, differences of pixels last."""
    figures = {"modes": metrics["diversity"].get("effective_modes")}
    figures |= {name: figure for name, figure in metrics["figures"].items() if name.startswith("diversity.")}
    return dict(sorted(_values(figures).items(), key=lambda item: item[0].startswith("diversity.pixels")))


def _values(figures: dict[str, dict[str, Any] | None]) -> dict[str, float]:
    return {name: figure["value"] for name, figure in figures.items() if figure and figure["value"] is not None}


def draw_grids(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> tuple[Any, Any, Any]:
    """One grid per model: a row per prompt, a column per seed, the same prompts and seeds in all three."""
    rows, shown = cache_rows(images), list(chosen)[: options.grid_prompts]
    return tuple(
        draw_grid(images, [rows[number, prompt][: options.grid_columns] for prompt in shown], options.grid_tile)
        for number in range(len(MODELS))
    )


def lay_out_pictures(images: Any, chosen: dict[int, str], options: EvaluateOptions) -> dict[str, Any]:
    """Functions that read the pictures of a prompt by seed, by model and prompt; empty without save_pictures."""
    if not options.save_pictures:
        return {}
    rows = cache_rows(images)
    return {
        name: {text: partial(pictures_by_seed, images, rows[number, row]) for row, text in chosen.items()}
        for number, name in enumerate(images.manifest["models"])
    }
