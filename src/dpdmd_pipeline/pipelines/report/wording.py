"""The metrics in words: their names, their numbers, and the verdict."""

from collections.abc import Callable, Mapping, Sequence
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

    def brief(self, value: float) -> str:
        """In four digits, of a metric whose range is not known here."""
        return f"{value:.4g}"

    def interval(self, measured: Mapping[str, float | None]) -> str:
        """`91.0 to 95.2`, without the unit; empty where one prompt alone gives none."""
        if measured["low"] is None:
            return ""
        low, high = (self.text(measured[end]).split()[0] for end in ("low", "high"))
        return f"{low} to {high}"


METRICS = {
    "valid": Metric(
        "valid",
        "Share of pictures in which the reader finds exactly one clean object: precision without a network.",
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
        "Share of all kinds of picture a prompt allows that were drawn at least once: recall without a network. Even a "
        "perfect model misses some: 64 pictures show 59 % of 72 kinds.",
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


def make_verdict(metrics: dict[str, Any]) -> str:
    """The result in one sentence, whichever way it went; what the intervals cannot tell apart is called so."""
    return f"{_diversity_clause(metrics)}{_quality_clause(metrics)}."


def _diversity_clause(metrics: dict[str, Any]) -> str:
    if all("effective_modes" in metrics[model]["diversity"] for model in MODELS):
        measured = [metrics[model]["diversity"]["effective_modes"] for model in MODELS]
        gap = metrics["dp_dmd"]["gap_recovered"]["effective_modes"]["value"]
        words = "{} effective modes a prompt against DMD's {} and the teacher's {}"
        return _compared(measured, gap, words, METRICS["effective_modes"].text)
    name = headline(metrics, ("diversity.",))
    if name is None:
        return "No diversity was measured of all three models, so nothing can be said of what DP-DMD keeps"
    measured = [metrics[model]["figures"][name] for model in MODELS]
    gap = metrics["dp_dmd"]["gaps"].get(name, {}).get("value")
    words = f"{{}} by {name} against DMD's {{}} and the teacher's {{}}"
    return _compared(measured, gap, words, Metric(name, "").brief)


def _compared(
    measured: Sequence[Mapping[str, Any]], gap: float | None, words: str, text: Callable[[float], str]
) -> str:
    """What became of diversity, from the figures of teacher, DMD and DP-DMD."""
    teacher, dmd, ours = measured
    numbers = words.format(*(text(found["value"]) for found in (ours, dmd, teacher)))
    if gap is None:
        return f"DMD lost no diversity here, so there was none for DP-DMD to recover: {numbers}"
    if teacher["low"] is None:
        return f"One prompt cannot tell what DMD's loss of diversity is, nor what DP-DMD recovers of it: {numbers}"
    if dmd["high"] >= teacher["low"]:
        return f"DMD's loss of diversity cannot be told from chance here, nor what DP-DMD recovers of it: {numbers}"
    if gap <= 0:
        return f"DP-DMD does not recover the diversity that DMD lost: {numbers}"
    if ours["low"] <= dmd["high"]:
        return f"DP-DMD does not measurably recover the diversity that DMD lost: {numbers}"
    share = "all" if gap >= 1 else f"{'' if gap >= 0.5 else 'only '}{gap_text(gap)}"
    return f"DP-DMD recovers {share} of the diversity that DMD lost: {numbers}"


_VALID = ("are valid no less often", "are valid a little less often", "are valid less often")
_SCORED = ("score no lower", "score a little lower", "score lower")


def _quality_clause(metrics: dict[str, Any]) -> str:
    if all("valid" in metrics[model]["quality"] for model in ("dmd", "dp_dmd")):
        pair = [metrics[model]["quality"]["valid"] for model in ("dmd", "dp_dmd")]
        return _not_worse(*pair, _VALID, "{} against {}", METRICS["valid"].text)
    name = headline(metrics, ("quality.", "preference.", "alignment."))
    if name is None:
        return "; their quality was not measured"
    pair = [metrics[model]["figures"][name] for model in ("dmd", "dp_dmd")]
    return _not_worse(*pair, _SCORED, f"{{}} against {{}} by {name}", Metric(name, "").brief)


def _not_worse(
    dmd: Mapping[str, Any],
    ours: Mapping[str, Any],
    verbs: tuple[str, str, str],
    words: str,
    text: Callable[[float], str],
) -> str:
    numbers = words.format(text(ours["value"]), text(dmd["value"]))
    if ours["value"] >= dmd["value"]:
        return f"; DP-DMD's pictures {verbs[0]} than DMD's, {numbers}"
    if ours["high"] is None or ours["high"] >= dmd["low"]:
        return f"; DP-DMD's pictures {verbs[1]} than DMD's, within the uncertainty, {numbers}"
    return f", but DP-DMD's pictures {verbs[2]} than DMD's, {numbers}"


def headline(metrics: dict[str, Any], starts: Sequence[str]) -> str | None:
    """The first figure of these axes that all models have; differences of pixels come last."""
    names = [name for name in metrics["dp_dmd"]["figures"] if all(_has(metrics[model], name) for model in MODELS)]
    found = [name for start in starts for name in names if name.startswith(start)]
    return next(iter(sorted(found, key=lambda name: name.startswith("diversity.pixels"))), None)


def _has(of_model: dict[str, Any], name: str) -> bool:
    return of_model["figures"].get(name, {}).get("value") is not None


# ---- words for numbers


def make_captions(metrics: dict[str, Any]) -> dict[str, str]:
    """What stands under each model's pictures."""
    captions = {model: f"{title}, {metrics[model]['nfe']}" for model, title in MODELS.items()}
    return {**captions, "teacher": f"{captions['teacher']} network evaluations"}


def metric_named(name: str) -> Metric:
    """Of this name; one that is not known here goes by its own name and is not explained."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def gap_text(value: float) -> str:
    """`90 %`."""
    return f"{100 * value:.0f} %"
