"""Rows of the page's tables, missing metrics and notes."""

from collections.abc import Mapping
from typing import Any

from dpdmd_pipeline.errors import MissingInputError, StageError
from dpdmd_pipeline.pipelines.report.wording import (
    DASH,
    MODELS,
    ROWS,
    Metric,
    brief,
    gap_text,
    make_verdict,
    metric_named,
    titles_of,
)


def describe_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Describe the metrics, under the names that the templates use."""
    if not metrics:
        raise MissingInputError("there are no metrics", stage="evaluate")
    _check_version(metrics)
    titles = titles_of(metrics)
    captions = {model: f"{title}, {metrics[model]['nfe']}" for model, title in titles.items()}
    ours = metrics["dp_dmd"]
    return {
        "verdict": make_verdict(metrics),
        "captions": {**captions, "teacher": f"{captions['teacher']} network evaluations"},
        "models": MODELS,
        "titles": titles,
        "metrics": metrics,
        "rows": _exact_rows(metrics) + figure_rows(metrics),
        "has_missing_gap": any(gap["low"] is None for gap in (*ours["gap_recovered"].values(), *ours["gaps"].values())),
        "missing": _missing_metrics(metrics),
        "faults": _fault_lines(metrics),
        "notes": _all_notes(metrics),
        "correlations": _correlation_rows(metrics),
        "dash": DASH,
    }


def _check_version(metrics: dict[str, Any]) -> None:
    missing = [
        f"rank_correlation of {name} within a model"
        for name, figure in metrics["rank_correlation"].items()
        if "within" not in figure
    ]
    gaps = metrics["dp_dmd"]["gap_recovered"]
    missing += [f"the interval of gap_recovered.{name}" for name, gap in gaps.items() if not isinstance(gap, dict)]
    missing += [f"notes of {model}" for model in titles_of(metrics) if "notes" not in metrics[model]]
    if missing:
        raise StageError(
            f"an older version of this package wrote the metrics ({missing[0]} is missing); evaluating again "
            "reuses the drawn pictures",
            stage="evaluate",
        )


def _exact_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per exact metric: title, explanation, (value, interval) of each model, and the gap recovered."""
    gaps = metrics["dp_dmd"]["gap_recovered"]
    return [
        {
            "title": metric_named(name).title,
            "explanation": metric_named(name).explanation,
            "cells": [_cell(metric_named(name), metrics[model][kind].get(name)) for model in titles_of(metrics)],
            "gap": _gap(gaps.get(name)),
        }
        for kind in ("quality", "diversity")
        for name in metrics["teacher"][kind]
    ]


def figure_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per other metric, with its full name and its protocol."""
    titles = titles_of(metrics)
    names = dict.fromkeys(name for model in titles for name in metrics[model]["figures"])
    gaps = metrics["dp_dmd"]["gaps"]
    rows = []
    for name in names:
        figures = {model: metrics[model]["figures"].get(name) for model in titles}
        rows.append({
            "title": name,
            "explanation": f"{next(filter(None, figures.values()))['preset']}. {_counts(figures)}.",
            "cells": [_brief_cell(figure) for figure in figures.values()],
            "gap": _gap(gaps.get(name)),
        })  # fmt: skip
    return rows


def _cell(metric: Metric, measured: Mapping[str, Any] | None) -> tuple[str, str]:
    """Value and interval; both empty without a measurement."""
    if measured is None or measured["value"] is None:
        return "", ""
    return metric.text(measured["value"]), metric.interval(measured)


def _brief_cell(measured: Mapping[str, Any] | None) -> tuple[str, str]:
    if measured is None or measured["value"] is None:
        return "", ""
    interval = "" if measured["low"] is None else f"{brief(measured['low'])} to {brief(measured['high'])}"
    return brief(measured["value"]), interval


def _counts(figures: Mapping[str, Mapping[str, Any] | None]) -> str:
    """`768 pictures of 12 prompts`, by model if they differ."""
    counts = {
        ROWS[model]: f"{figure['n']['pictures']} pictures of {figure['n']['prompts']} prompts"
        for model, figure in figures.items()
        if figure
    }
    texts = list(dict.fromkeys(counts.values()))
    return texts[0] if len(texts) == 1 else "; ".join(f"{title}: {text}" for title, text in counts.items())


def _gap(gap: Mapping[str, Any] | None) -> str:
    """`96 % (94 to 98)`; a dash if chance explains DMD's loss."""
    share, interval = gap_cell(gap)
    return f"{share} ({interval})" if interval else share


def gap_cell(gap: Mapping[str, Any] | None) -> tuple[str, str]:
    """Share and interval, `96 %` and `94 to 98`; both empty for metrics without a gap."""
    if gap is None:
        return "", ""
    if gap["low"] is None or gap["high"] is None:
        return DASH, ""
    return gap_text(gap["value"]), f"{100 * gap['low']:.0f} to {100 * gap['high']:.0f}"


def _missing_metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(names, reason) of the requested metrics that were not measured, once per reason."""
    reasons: dict[str, dict[str, None]] = {}
    for model in titles_of(metrics):
        for name, reason in metrics[model]["missing"].items():
            reasons.setdefault(reason, {})[name] = None
    return [(", ".join(names), reason) for reason, names in reasons.items()]


def _fault_lines(metrics: dict[str, Any]) -> list[str]:
    """Pictures without a score: `DMD: 3 x the network gave no finite number (quality.arniqa)`."""
    return [
        f"{title}: {count} x {kind}"
        for model, title in titles_of(metrics).items()
        for kind, count in metrics[model]["faults"].items()
    ]


def _all_notes(metrics: dict[str, Any]) -> list[str]:
    """Limits of the figures: `DMD: FID of fewer than ...`, without titles if the note is about all models."""
    models: dict[str, list[str]] = {}
    titles = titles_of(metrics)
    for model, title in titles.items():
        for note in metrics[model]["notes"]:
            models.setdefault(note, []).append(title)
    notes = [note if len(ofs) == len(titles) else f"{', '.join(ofs)}: {note}" for note, ofs in models.items()]
    return [*notes, *metrics["dp_dmd"]["gap_notes"]]


def _correlation_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Rank correlations with the exact reader, with their intervals: one row per metric."""
    return [
        {"name": name, "pooled": _correlation(figure), "within": _correlation(figure["within"])}
        for name, figure in metrics["rank_correlation"].items()
        if figure["value"] is not None
    ]


def _correlation(figure: dict[str, Any]) -> str:
    """`0.76 (0.62 to 0.88)`; empty without a correlation."""
    if figure["value"] is None:
        return ""
    spread = "" if figure["low"] is None else f" ({figure['low']:.2f} to {figure['high']:.2f})"
    return f"{figure['value']:.2f}{spread}"
