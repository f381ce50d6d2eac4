"""The metrics as the page's tables have them, and what could not be measured."""

from collections.abc import Mapping
from typing import Any

from dpdmd_pipeline.pipelines.report.wording import (
    DASH,
    MODELS,
    Metric,
    gap_text,
    make_captions,
    make_verdict,
    metric_named,
)


def result_words(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the page says of the metrics, under the names that its templates use.

    Raises:
        ValueError: where nothing was measured, or an older version of this package has.
    """
    if not metrics:
        raise ValueError("nothing was measured: run `kedro run --pipelines evaluate` first")
    _refuse_older(metrics)
    return {
        "verdict": make_verdict(metrics),
        "captions": make_captions(metrics),
        "models": MODELS,
        "metrics": metrics,
        "rows": table_rows(metrics) + figure_rows(metrics),
        "gaps_missing": gaps_missing(metrics),
        "missing": missing_metrics(metrics),
        "left_out": left_out(metrics),
        "notes": to_know(metrics),
        "correlations": correlation_rows(metrics),
        "dash": DASH,
    }


def _refuse_older(metrics: dict[str, Any]) -> None:
    lacks = [
        f"rank_correlation of {name} within a model"
        for name, figure in metrics["rank_correlation"].items()
        if "within" not in figure
    ]
    gaps = metrics["dp_dmd"]["gap_recovered"]
    lacks += [f"the interval of gap_recovered.{name}" for name, gap in gaps.items() if not isinstance(gap, dict)]
    lacks += [f"notes of {model}" for model in MODELS if "notes" not in metrics[model]]
    if lacks:
        raise ValueError(
            f"the metrics are of an older version ({lacks[0]} is not there): `kedro run --pipelines evaluate,report` "
            "measures again what has changed, and draws no picture again"
        )


def table_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric: title, explanation, a (value, interval) per model, and the gap recovered where it has one."""
    gaps = metrics["dp_dmd"]["gap_recovered"]
    return [
        {
            "title": metric_named(name).title,
            "explanation": metric_named(name).explanation,
            "cells": [_cell(metric_named(name), metrics[model][kind].get(name)) for model in MODELS],
            "gap": certain_gap(gaps[name]) if name in gaps else None,
        }
        for kind in ("quality", "diversity")
        for name in metrics["teacher"][kind]
    ]


def figure_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The same for the metrics of the library, by their full names and with their protocol."""
    names = dict.fromkeys(name for model in MODELS for name in metrics[model]["figures"])
    gaps = metrics["dp_dmd"]["gaps"]
    rows = []
    for name in names:
        found = {model: metrics[model]["figures"].get(name) for model in MODELS}
        rows.append({
            "title": name,
            "explanation": f"{next(filter(None, found.values()))['preset']}. {_counted(found)}.",
            "cells": [_cell(Metric(name, ""), figure, brief=True) for figure in found.values()],
            "gap": certain_gap(gaps[name]) if name in gaps else None,
        })  # fmt: skip
    return rows


def _cell(metric: Metric, measured: Mapping[str, Any] | None, brief: bool = False) -> tuple[str, str]:
    """Value and interval; both empty where there is none."""
    if measured is None or measured["value"] is None:
        return "", ""
    if not brief:
        return metric.text(measured["value"]), metric.interval(measured)
    spread = "" if measured["low"] is None else " to ".join(metric.brief(measured[end]) for end in ("low", "high"))
    return metric.brief(measured["value"]), spread


def _counted(found: Mapping[str, Mapping[str, Any] | None]) -> str:
    """`768 pictures of 12 prompts`, by model where they differ."""
    counts = {
        MODELS[model]: f"{figure['n']['pictures']} pictures of {figure['n']['prompts']} prompts"
        for model, figure in found.items()
        if figure
    }
    texts = list(dict.fromkeys(counts.values()))
    return texts[0] if len(texts) == 1 else "; ".join(f"{title}: {text}" for title, text in counts.items())


def certain_gap(gap: Mapping[str, Any]) -> str:
    """`96 % (94 to 98)`; a dash where DMD's loss cannot be told from chance."""
    share, spread = gap_cell(gap)
    return f"{share} ({spread})" if spread else share


def gap_cell(gap: Mapping[str, Any]) -> tuple[str, str]:
    """The share and its interval, `96 %` and `94 to 98`."""
    if gap["low"] is None or gap["high"] is None:
        return DASH, ""
    return gap_text(gap["value"]), f"{100 * gap['low']:.0f} to {100 * gap['high']:.0f}"


def missing_metrics(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """(names, reason) of what was asked for and not measured, once for all models that share it."""
    reasons: dict[str, dict[str, None]] = {}
    for model in MODELS:
        for name, reason in metrics[model]["missing"].items():
            reasons.setdefault(reason, {})[name] = None
    return [(", ".join(names), reason) for reason, names in reasons.items()]


def left_out(metrics: dict[str, Any]) -> list[str]:
    """`DMD: 3 x the network gave no finite number (quality.arniqa)`."""
    return [
        f"{title}: {count} x {kind}"
        for model, title in MODELS.items()
        for kind, count in metrics[model]["faults"].items()
    ]


def to_know(metrics: dict[str, Any]) -> list[str]:
    """What limits the figures: `DMD: FID of fewer than ...`, without the models where it is true of all."""
    found: dict[str, list[str]] = {}
    for model, title in MODELS.items():
        for note in metrics[model]["notes"]:
            found.setdefault(note, []).append(title)
    told = [note if len(titles) == len(MODELS) else f"{', '.join(titles)}: {note}" for note, titles in found.items()]
    return [*told, *metrics["dp_dmd"]["gap_notes"]]


def correlation_rows(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """The metrics that were set against the exact reader: name, and correlations with their intervals."""
    return [
        {"name": name, "pooled": _correlation(figure), "within": _correlation(figure["within"])}
        for name, figure in metrics["rank_correlation"].items()
        if figure["value"] is not None
    ]


def _correlation(figure: dict[str, Any]) -> str:
    """`.76 (.62 to .88)`; empty where nothing was ranked."""
    if figure["value"] is None:
        return ""
    spread = "" if figure["low"] is None else f" ({figure['low']:.2f} to {figure['high']:.2f})"
    return f"{figure['value']:.2f}{spread}"


def gaps_missing(metrics: dict[str, Any]) -> bool:
    """Whether some metric has a dash for the share that DP-DMD recovers."""
    ours = metrics["dp_dmd"]
    return any(gap["low"] is None for gap in (*ours["gap_recovered"].values(), *ours["gaps"].values()))
