"""The metrics in words: their names, their numbers, and the verdict."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODELS = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD"}
DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class Metric:
    """How a metric is called, written and explained."""

    title: str
    explanation: str
    digits: int = 3
    percent: bool = False
    unit: str = ""

    def number(self, value: float) -> str:
        """`93.1 %`, `4.21`."""
        return f"{100 * value:.{self.digits}f} %" if self.percent else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """With the unit: `93.1 %`, `4.21 bits`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def interval(self, measured: Mapping[str, float]) -> str:
        """`91.0 to 95.2`, without the unit."""
        low, high = (self.text(measured[end]).split()[0] for end in ("low", "high"))
        return f"{low} to {high}"


METRICS = {
    "valid": Metric(
        "valid",
        "Share of pictures in which the reader finds exactly one clean object of the world.",
        digits=1,
        percent=True,
    ),
    "aligned": Metric(
        "aligned",
        "Share of pictures that are valid and show the colour and shape that the prompt names.",
        digits=1,
        percent=True,
    ),
    "residual": Metric(
        "residual",
        "Distance from the nearest perfect picture at the worst place (RMS of an 8x8 window); 0 is perfect.",
    ),
    "effective_modes": Metric(
        "effective modes",
        "How many equally likely kinds of picture would make two seeds agree as often as these do; 1 means that every "
        "seed gives the same.",
        digits=1,
    ),
    "coverage": Metric(
        "coverage",
        "Share of all kinds of picture a prompt allows that were drawn at least once; with few pictures a prompt even "
        "a perfect model misses some.",
        digits=1,
        percent=True,
    ),
    "entropy": Metric(
        "entropy",
        "Surprise at the kind of picture the next seed gives; 0 bits when it is always the same.",
        digits=2,
        unit="bits",
    ),
    "pairwise_distance": Metric(
        "pairwise distance",
        "Mean difference between any two pictures of a prompt, RMS per pixel; needs no reader, but blur and noise "
        "move it too.",
    ),
}


def result_words(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the page says of the metrics, under the names that its templates use."""
    return {
        "verdict": make_verdict(metrics),
        "captions": make_captions(metrics),
        "models": MODELS,
        "metrics": metrics,
        "rows": table_rows(metrics),
        "gaps_missing": gaps_missing(metrics),
        "dash": DASH,
    }


def make_verdict(metrics: dict[str, Any]) -> str:
    """The result in one sentence, whichever way it went; what the intervals cannot tell apart is called so."""
    return f"{_diversity_clause(metrics)}{_validity_clause(metrics)}."


def _diversity_clause(metrics: dict[str, Any]) -> str:
    teacher, dmd, ours = (metrics[model]["diversity"]["effective_modes"] for model in MODELS)
    gap = metrics["dp_dmd"]["gap_recovered"]["effective_modes"]
    modes = [METRICS["effective_modes"].text(measured["value"]) for measured in (ours, dmd, teacher)]
    numbers = "{} effective modes a prompt against DMD's {} and the teacher's {}".format(*modes)
    if gap is None:
        return f"DMD lost no diversity here, so there was none for DP-DMD to recover: {numbers}"
    if dmd["high"] >= teacher["low"]:
        return f"DMD's loss of diversity cannot be told from chance here, nor what DP-DMD recovers of it: {numbers}"
    if gap <= 0:
        return f"DP-DMD does not recover the diversity that DMD lost: {numbers}"
    if ours["low"] <= dmd["high"]:
        return f"DP-DMD does not measurably recover the diversity that DMD lost: {numbers}"
    share = "all" if gap >= 1 else f"{'' if gap >= 0.5 else 'only '}{gap_text(gap)}"
    return f"DP-DMD recovers {share} of the diversity that DMD lost: {numbers}"


def _validity_clause(metrics: dict[str, Any]) -> str:
    dmd, ours = (metrics[model]["quality"]["valid"] for model in ("dmd", "dp_dmd"))
    of = METRICS["valid"].text
    numbers = f"{of(ours['value'])} against {of(dmd['value'])}"
    if ours["value"] >= dmd["value"]:
        return f"; DP-DMD's pictures are valid no less often than DMD's, {numbers}"
    if ours["high"] >= dmd["low"]:
        return f"; DP-DMD's pictures are valid a little less often than DMD's, within the uncertainty, {numbers}"
    return f", but DP-DMD's pictures are valid less often than DMD's, {numbers}"


def make_captions(metrics: dict[str, Any]) -> dict[str, str]:
    """What stands under each model's pictures."""
    captions = {model: f"{title}, {metrics[model]['nfe']}" for model, title in MODELS.items()}
    return {**captions, "teacher": f"{captions['teacher']} network evaluations"}


def table_rows(metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per metric: title, explanation, a (value, interval) per model, and the gap recovered where it has one."""
    gaps = metrics["dp_dmd"]["gap_recovered"]
    return [
        {
            "title": metric_named(name).title,
            "explanation": metric_named(name).explanation,
            "cells": [
                (metric_named(name).text(measured["value"]), metric_named(name).interval(measured))
                for measured in (metrics[model][kind][name] for model in MODELS)
            ],
            "gap": gap_text(gaps[name]) if name in gaps else None,
        }
        for kind in ("quality", "diversity")
        for name in metrics["teacher"][kind]
    ]


def metric_named(name: str) -> Metric:
    """Of this name; one that is not known here goes by its own name and is not explained."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def gap_text(value: float | None, missing: str = DASH) -> str:
    """`90 %`."""
    return missing if value is None else f"{100 * value:.0f} %"


def gaps_missing(metrics: dict[str, Any]) -> bool:
    """Whether DMD lost nothing in some metric, so that the share of it that DP-DMD recovers is not defined."""
    return None in metrics["dp_dmd"]["gap_recovered"].values()
