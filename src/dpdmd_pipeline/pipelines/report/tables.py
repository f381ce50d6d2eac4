"""Rows of the page's tables, missing metrics and notes."""

from collections.abc import Iterable, Mapping
from typing import Any

from dpdmd_pipeline.errors import MissingInputError, StageError
from dpdmd_pipeline.pipelines.report.wording import (
    DASH,
    GAP,
    MODELS,
    ROWS,
    Metric,
    big_numbers,
    make_verdict,
    metric_named,
    titles_of,
)
from dpdmd_pipeline.wording import grouped


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
        "big_numbers": big_numbers(metrics),
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
    gaps = metrics["dp_dmd"]["gap_recovered"]
    missing = [
        *(
            f"rank_correlation of {k} within a model"
            for k, v in metrics["rank_correlation"].items()
            if "within" not in v
        ),
        *(f"the interval of gap_recovered.{name}" for name, gap in gaps.items() if not isinstance(gap, dict)),
        *(f"notes of {model}" for model in titles_of(metrics) if "notes" not in metrics[model]),
    ]
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
        _row(kind, metric_named(name), [metrics[model][kind].get(name) for model in titles_of(metrics)], gaps.get(name))
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
        figures = {model: metrics[model]["figures"].get(name) for model in titles_of(metrics)}
        protocol = next(filter(None, figures.values()))["preset"]
        metric = Metric(name, f"{protocol}. {_counts(figures)}.")
        rows.append(_row(name.partition(".")[0], metric, figures.values(), gaps.get(name)))
    return rows


def _row(
    axis: str, metric: Metric, figures: Iterable[Mapping[str, Any] | None], gap: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {
        "axis": axis,
        "title": metric.title,
        "term": metric.term,
        "explanation": metric.explanation,
        "cells": [_cell(metric, figure) for figure in figures],
        "gap": _joined(gap_cell(gap)),
    }


def _cell(metric: Metric, figure: Mapping[str, Any] | None) -> tuple[str, str]:
    """Value and interval; both empty without a measurement."""
    if figure is None or figure["value"] is None:
        return "", ""
    return metric.text(figure["value"]), metric.interval(figure)


def gap_cell(gap: Mapping[str, Any] | None) -> tuple[str, str]:
    """Share and interval, `96 %` and `94 to 98`; a dash if chance explains DMD's loss, empty without a gap."""
    return (DASH, "") if gap is not None and gap["low"] is None else _cell(GAP, gap)


def _joined(cell: tuple[str, str]) -> str:
    """`96 % (94 to 98)`."""
    value, interval = cell
    return f"{value} ({interval})" if interval else value


def _counts(figures: Mapping[str, Mapping[str, Any] | None]) -> str:
    """`768 pictures of 12 prompts`, by model if they differ."""
    counts = {
        ROWS[model]: f"{figure['n']['pictures']} pictures of {figure['n']['prompts']} prompts"
        for model, figure in figures.items()
        if figure
    }
    texts = list(dict.fromkeys(counts.values()))
    return texts[0] if len(texts) == 1 else "; ".join(f"{title}: {text}" for title, text in counts.items())


def _missing_metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(names, reason) of the requested metrics that were not measured, once per reason."""
    reasons = grouped(
        (reason, name) for model in titles_of(metrics) for name, reason in metrics[model]["missing"].items()
    )
    return [(", ".join(dict.fromkeys(names)), reason) for reason, names in reasons.items()]


def _fault_lines(metrics: dict[str, Any]) -> list[str]:
    """Pictures without a score: `DMD: 3 x the network gave no finite number (quality.arniqa)`."""
    return [
        f"{title}: {count} x {kind}"
        for model, title in titles_of(metrics).items()
        for kind, count in metrics[model]["faults"].items()
    ]


def _all_notes(metrics: dict[str, Any]) -> list[str]:
    """Limits of the figures: `DMD: FID of fewer than ...`, without titles if the note is about all models."""
    titles = titles_of(metrics)
    models = grouped((note, title) for model, title in titles.items() for note in metrics[model]["notes"])
    notes = [note if len(ofs) == len(titles) else f"{', '.join(ofs)}: {note}" for note, ofs in models.items()]
    return [*notes, *metrics["dp_dmd"]["gap_notes"]]


def _correlation_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Rank correlations with the exact reader, with their intervals, `0.76 (0.62 to 0.88)`: one row per metric."""
    two_digits = Metric("", "", digits=2)
    return [
        {"name": name}
        | {key: _joined(_cell(two_digits, one)) for key, one in {"pooled": figure, "within": figure["within"]}.items()}
        for name, figure in metrics["rank_correlation"].items()
        if figure["value"] is not None
    ]
