"""Words of the page: titles, explanations, numbers, and the verdict."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELS = {"teacher": "teacher", "dmd": "DMD", "dp_dmd": "DP-DMD"}
ROWS = {"teacher": "teacher", "dmd": "DMD", "dmd_start": "DMD + teacher start", "dp_dmd": "DP-DMD"}  # of the tables
DASH = "\N{EM DASH}"


@dataclass(frozen=True)
class Metric:
    """Title, explanation and number format of a metric: four significant digits, or so many after the point.

    `term` is its name in the literature and in the files, if the title is another.
    """

    title: str
    explanation: str
    digits: int | None = None
    percent: bool = False
    unit: str = ""
    term: str = ""

    def number(self, value: float) -> str:
        """`93.1 %`, `4.21`."""
        if self.digits is None:
            return f"{value:.4g}"
        return f"{100 * value:.{self.digits}f} %" if self.percent else f"{value:.{self.digits}f}"

    def text(self, value: float) -> str:
        """With the unit: `93.1 %`, `4.21 bits`."""
        return f"{self.number(value)} {self.unit}".rstrip()

    def interval(self, measured: Mapping[str, float | None]) -> str:
        """`91.0 to 95.2`, without the unit; empty if a single prompt gives no interval."""
        if measured["low"] is None:
            return ""
        return " to ".join(self.number(measured[end]).removesuffix(" %") for end in ("low", "high"))


METRICS = {
    "valid": Metric(
        "clean pictures",
        "Share of pictures with exactly one clean object, by the exact reader: precision without a network.",
        digits=1,
        percent=True,
        term="valid",
    ),
    "aligned": Metric(
        "true to the prompt",
        "Share of pictures that are valid and show the colour and shape of their prompt.",
        digits=1,
        percent=True,
        term="aligned",
    ),
    "residual": Metric(
        "blemishes",
        "Distance from the nearest perfect picture in the worst 8x8 window (RMS); 0 is perfect.",
        digits=3,
        term="residual",
    ),
    "effective_modes": Metric(
        "distinct kinds of picture",
        "Number of different kinds of picture per prompt, as one over the chance that two seeds agree; 1 means that "
        "every seed gives the same kind.",
        digits=1,
        term="effective modes",
    ),
    "coverage": Metric(
        "share of all kinds drawn",
        "Share of a prompt's possible kinds of picture that were drawn at least once: recall without a network. Even a "
        "perfect model misses some: 64 pictures show 59 % of 72 kinds.",
        digits=1,
        percent=True,
        term="coverage",
    ),
    "entropy": Metric(
        "surprise of the next seed",
        "Uncertainty about the kind of picture of the next seed; 0 bits if it is always the same.",
        digits=2,
        unit="bits",
        term="entropy",
    ),
    "pairwise_distance": Metric(
        "difference of two pictures",
        "Mean difference between two pictures of the same prompt, RMS per pixel; needs no reader, but blur and noise "
        "change it too.",
        digits=3,
        term="pairwise distance",
    ),
}

_DIVERSITIES = ("effective_modes", "diversity.")  # the first one that all models have is the headline
_QUALITIES = ("valid", "quality.", "preference.", "alignment.")
GAP = Metric("gap recovered", "", digits=0, percent=True)
FIGURE = Metric("", "")  # of unknown range

CURVES = {  # title and explanation of a history's values
    "dmd_loss": ("DMD loss", "Pulls the pictures towards what the teacher finds likely; it need not fall."),
    "diversity_loss": (
        "Diversity loss",
        "Distance of DP-DMD's anchored steps from the teacher's; DMD has no such loss.",
    ),
    "fake_score_loss": ("Fake-score loss", "Error of the network that tracks the student's distribution."),
    "latent_diversity": (
        "Diversity during training",
        "Distance between latents of the same prompt; it falls as diversity is lost.",
    ),
    "correction": ("Quality during training", "Change that the teacher makes to a noised latent; lower is better."),
    "grad_ratio": ("Gradient ratio", "Weighted diversity gradient divided by the DMD gradient; 1 means balance."),
}


def titles_of(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Titles of the measured models, in the order of the tables."""
    return {model: title for model, title in ROWS.items() if model in metrics}


def metric_named(name: str) -> Metric:
    """Look up a metric; unknown metrics keep their raw name and have no explanation."""
    return METRICS.get(name) or Metric(name.replace("_", " "), "")


def student_cycles(runs: Mapping[str, list[dict]]) -> str:
    """Sentence that names the cycle of each student: the one that training chose, or the last."""
    chosen = {name: [int(row["best_step"]) for row in rows if row.get("best_step")] for name, rows in runs.items()}
    if not any(chosen.values()):
        return "Both students come from their last cycle."
    cycles = [f"{name} comes from cycle {(chosen[name] or [rows[-1]['step']])[-1]}" for name, rows in runs.items()]
    return (
        f"{', '.join(cycles)}. If that is not the last cycle, training chose it among the measured cycles with at "
        "least train.watch.diversity_floor of the teacher's diversity: the teacher corrects its pictures least."
    )


# ---- the verdict


def make_verdict(metrics: dict[str, Any]) -> str:
    """The result in one sentence; differences within the intervals are called uncertain."""
    return f"{_diversity_clause(metrics)}{_quality_clause(metrics)}."


def _diversity_clause(metrics: dict[str, Any]) -> str:
    ours = metrics["dp_dmd"]
    name, figures = _headline(metrics, _DIVERSITIES)
    if name is None:
        return "No diversity metric was measured for all three models, so there is no result on diversity"
    gap = (ours["gap_recovered"] | ours["gaps"]).get(name, {}).get("value")
    is_exact = name in METRICS
    words = f"{metric_named(name).title} per prompt" if is_exact else f"by {name}"
    return _compare_diversity(figures, gap, words, METRICS[name] if is_exact else FIGURE)


def _compare_diversity(measured: Sequence[Mapping[str, Any]], gap: float | None, name: str, metric: Metric) -> str:
    """Compare the diversity of teacher, DMD and DP-DMD."""
    teacher, dmd, ours = measured
    values = [metric.text(figure["value"]) for figure in measured]
    numbers = "{2} {name}, against {1} for DMD and {0} for the teacher".format(*values, name=name)
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
    share = "all" if gap >= 1 else f"{'' if gap >= 0.5 else 'only '}{GAP.text(gap)}"
    return f"DP-DMD recovers {share} of the diversity that DMD lost: {numbers}"


def big_numbers(metrics: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The result in three numbers, each with its words and what to compare it with."""
    evaluations = {model: metrics[model]["nfe"] for model in MODELS}
    compared = f"teacher {evaluations['teacher']}, DMD {evaluations['dmd']}"
    return [*_big_figures(metrics), (str(evaluations["dp_dmd"]), "network evaluations per picture", compared)]


def _big_figures(metrics: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    """DP-DMD's diversity, as the share recovered if there is one, and its quality."""
    ours = metrics["dp_dmd"]
    name, figures = _headline(metrics, _DIVERSITIES)
    if name:
        gap = (ours["gap_recovered"] | ours["gaps"]).get(name)
        words = f"{metric_named(name).title}, of DP-DMD"
        if gap and gap["value"] is not None:
            interval = f"; 95 % interval {GAP.interval(gap)}" if gap["low"] is not None else ""
            words = "of the diversity that DMD lost is back"
            yield GAP.text(gap["value"]), words, f"{metric_named(name).title}: {_compared(name, figures)}{interval}"
        else:
            yield metric_named(name).text(figures[2]["value"]), words, _compared(name, figures)
    name, figures = _headline(metrics, _QUALITIES)
    if name:
        metric = metric_named(name)
        yield metric.text(figures[2]["value"]), f"{metric.title}, of DP-DMD", _compared(name, figures)


def _compared(name: str, figures: Sequence[Mapping[str, Any]]) -> str:
    """`teacher 66.5, DMD 2.7, DP-DMD 61.2`."""
    metric = metric_named(name)
    return ", ".join(f"{MODELS[m]} {metric.text(f['value'])}" for m, f in zip(MODELS, figures, strict=True))


_VALID = ("are valid at least as often as", "are valid slightly less often than", "are valid less often than")
_SCORED = ("score at least as high as", "score slightly lower than", "score lower than")


def _quality_clause(metrics: dict[str, Any]) -> str:
    name, figures = _headline(metrics, _QUALITIES)
    if name is None:
        return "; their quality was not measured"
    is_exact = name in METRICS
    verbs, source, metric = (_VALID, "", METRICS[name]) if is_exact else (_SCORED, f" by {name}", FIGURE)
    _, dmd, ours = figures
    numbers = f"{metric.text(ours['value'])} against {metric.text(dmd['value'])}{source}"
    if ours["value"] >= dmd["value"]:
        return f"; DP-DMD's pictures {verbs[0]} DMD's, {numbers}"
    if ours["high"] is None or ours["high"] >= dmd["low"]:
        return f"; DP-DMD's pictures {verbs[1]} DMD's, within the uncertainty, {numbers}"
    return f", but DP-DMD's pictures {verbs[2]} DMD's, {numbers}"


def _headline(metrics: dict[str, Any], prefixes: Sequence[str]) -> tuple[str | None, list[Mapping[str, Any]]]:
    """Name and figures by model of the first figure with one of these prefixes that was measured for all models."""
    figures = {
        model: metrics[model]["quality"] | metrics[model]["diversity"] | metrics[model]["figures"] for model in MODELS
    }
    measured = {
        model: [name for name, figure in of_model.items() if figure["value"] is not None]
        for model, of_model in figures.items()
    }
    name = first_common(measured, prefixes)
    return name, [of_model[name] for of_model in figures.values()] if name else []


def first_common(names: Mapping[str, Collection[str]], prefixes: Sequence[str]) -> str | None:
    """First of the names that all models have, in the order of the prefixes; differences of pixels come last."""
    first, *others = names.values()
    common = [name for name in first if all(name in other for other in others)]
    common.sort(key=lambda name: name.startswith("diversity.pixels"))
    return next((name for prefix in prefixes for name in common if name.startswith(prefix)), None)
