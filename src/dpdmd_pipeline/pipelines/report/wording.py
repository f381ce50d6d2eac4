"""Words for the metrics: titles, explanations, numbers, and the verdict."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELS = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD"}
DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class Metric:
    """Title, explanation and number format of a metric."""

    title: str
    explanation: str
    digits: int = 3
    percent: bool = False
    unit: str = ""

    @property
    def heading(self) -> str:
        """Title with the unit: `entropy, bits`."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def number(self, value: float) -> str:
        """`93.1 %`, `4.21`."""
        return f"{100 * value:.{self.digits}f} %" if self.percent else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """With the unit: `93.1 %`, `4.21 bits`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def brief(self, value: float) -> str:
        """Four digits, for a metric of unknown range."""
        return f"{value:.4g}"

    def interval(self, measured: Mapping[str, float | None]) -> str:
        """`91.0 to 95.2`, without the unit; empty if a single prompt gives no interval."""
        if measured["low"] is None:
            return ""
        low, high = (self.text(measured[end]).split()[0] for end in ("low", "high"))
        return f"{low} to {high}"


METRICS = {
    "valid": Metric(
        "valid",
        "Share of pictures with exactly one clean object, by the exact reader: precision without a network.",
        digits=1,
        percent=True,
    ),
    "aligned": Metric(
        "aligned",
        "Share of pictures that are valid and show the colour and shape of their prompt.",
        digits=1,
        percent=True,
    ),
    "residual": Metric(
        "residual",
        "Distance from the nearest perfect picture in the worst 8x8 window (RMS); 0 is perfect.",
    ),
    "effective_modes": Metric(
        "effective modes",
        "Number of different kinds of picture per prompt, as one over the chance that two seeds agree; 1 means that "
        "every seed gives the same kind.",
        digits=1,
    ),
    "coverage": Metric(
        "coverage",
        "Share of a prompt's possible kinds of picture that were drawn at least once: recall without a network. Even a "
        "perfect model misses some: 64 pictures show 59 % of 72 kinds.",
        digits=1,
        percent=True,
    ),
    "entropy": Metric(
        "entropy",
        "Uncertainty about the kind of picture of the next seed; 0 bits if it is always the same.",
        digits=2,
        unit="bits",
    ),
    "pairwise_distance": Metric(
        "pairwise distance",
        "Mean difference between two pictures of the same prompt, RMS per pixel; needs no reader, but blur and noise "
        "change it too.",
    ),
}


def make_verdict(metrics: dict[str, Any]) -> str:
    """The result in one sentence; differences within the intervals are called uncertain."""
    return f"{_diversity_clause(metrics)}{_quality_clause(metrics)}."


def _diversity_clause(metrics: dict[str, Any]) -> str:
    if all("effective_modes" in metrics[model]["diversity"] for model in MODELS):
        measured = [metrics[model]["diversity"]["effective_modes"] for model in MODELS]
        gap = metrics["dp_dmd"]["gap_recovered"]["effective_modes"]["value"]
        words = "{} effective modes per prompt, against {} for DMD and {} for the teacher"
        return _compared(measured, gap, words, METRICS["effective_modes"].text)
    name = headline(metrics, ("diversity.",))
    if name is None:
        return "No diversity metric was measured for all three models, so there is no result on diversity"
    measured = [metrics[model]["figures"][name] for model in MODELS]
    gap = metrics["dp_dmd"]["gaps"].get(name, {}).get("value")
    words = f"{{}} by {name}, against {{}} for DMD and {{}} for the teacher"
    return _compared(measured, gap, words, Metric(name, "").brief)


def _compared(
    measured: Sequence[Mapping[str, Any]], gap: float | None, words: str, text: Callable[[float], str]
) -> str:
    """Compare the diversity of teacher, DMD and DP-DMD in one clause."""
    teacher, dmd, ours = measured
    numbers = words.format(*(text(figure["value"]) for figure in (ours, dmd, teacher)))
    if gap is None:
        return f"DMD lost no diversity, so DP-DMD had none to recover: {numbers}"
    if teacher["low"] is None:
        return f"One prompt cannot tell how much diversity DMD lost and DP-DMD recovers: {numbers}"
    if dmd["high"] >= teacher["low"]:
        return f"Chance may explain DMD's loss of diversity, so the share that DP-DMD recovers is unknown: {numbers}"
    if gap <= 0:
        return f"DP-DMD does not recover the diversity that DMD lost: {numbers}"
    if ours["low"] <= dmd["high"]:
        return f"DP-DMD does not measurably recover the diversity that DMD lost: {numbers}"
    share = "all" if gap >= 1 else f"{'' if gap >= 0.5 else 'only '}{gap_text(gap)}"
    return f"DP-DMD recovers {share} of the diversity that DMD lost: {numbers}"


_VALID = ("are valid at least as often as", "are valid slightly less often than", "are valid less often than")
_SCORED = ("score at least as high as", "score slightly lower than", "score lower than")


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
        return f"; DP-DMD's pictures {verbs[0]} DMD's, {numbers}"
    if ours["high"] is None or ours["high"] >= dmd["low"]:
        return f"; DP-DMD's pictures {verbs[1]} DMD's, within the uncertainty, {numbers}"
    return f", but DP-DMD's pictures {verbs[2]} DMD's, {numbers}"


def headline(metrics: dict[str, Any], prefixes: Sequence[str]) -> str | None:
    """First figure with one of these prefixes that was measured for all models."""
    figures = {model: metrics[model]["figures"].items() for model in MODELS}
    measured = {
        model: [name for name, figure in items if figure["value"] is not None] for model, items in figures.items()
    }
    return first_common(measured, prefixes)


def first_common(names: Mapping[str, Collection[str]], prefixes: Sequence[str]) -> str | None:
    """First of the names that all models have, in the order of the prefixes; differences of pixels come last."""
    first, *others = names.values()
    common = [name for name in first if all(name in other for other in others)]
    common.sort(key=lambda name: name.startswith("diversity.pixels"))
    return next((name for prefix in prefixes for name in common if name.startswith(prefix)), None)


def make_captions(metrics: dict[str, Any]) -> dict[str, str]:
    """Captions of each model's pictures."""
    captions = {model: f"{title}, {metrics[model]['nfe']}" for model, title in MODELS.items()}
    return {**captions, "teacher": f"{captions['teacher']} network evaluations"}


def metric_named(name: str) -> Metric:
    """Look up a metric; unknown metrics keep their raw name and have no explanation."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def gap_text(value: float) -> str:
    """`90 %`."""
    return f"{100 * value:.0f} %"
