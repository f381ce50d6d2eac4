"""Notes on what sizes, numbers of pictures, long prompts and thresholds do to the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from dpdmd_pipeline.metrics.distribution import LARGEST, NEIGHBOURS
from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.scores import Row, Scores
from dpdmd_pipeline.wording import counted, listed

_FEW = 3  # prompts in a note


def note_numbers(scores: Scores, preset: Preset) -> None:
    """Note a metric of diversity over prompts with different numbers of usable pictures."""
    sizes = Counter(scores.usable[preset.full_name].values())
    if preset.axis == "diversity" and len(sizes) > 1:
        spread = ", ".join(f"{counted(count, 'prompt')} with {size}" for size, count in sorted(sizes.items()))
        scores.note(
            f"prompts have unequal numbers of usable pictures ({spread}): Vendi and near-duplicates depend on them"
        )


def note_cut_prompts(scores: Scores, preset: Preset, rows: Sequence[Row]) -> None:
    """Note prompts that are longer than the network reads."""
    limits = [row.measured.cut_at for row in rows if row.measured.cut_at is not None]
    if limits:
        scores.note(
            f"{len(limits)} of {len(rows)} prompts are longer than {limits[0]} tokens and were cut ({preset.full_name})"
        )


def note_sizes(scores: Scores, rows: Sequence[Row], where: str = "") -> tuple[int, int] | None:
    """Note prompts whose pictures differ from the most frequent size, and return that size."""
    counts = Counter(size for row in rows for size in row.sizes)
    if not counts:
        return None
    common = counts.most_common(1)[0][0]
    others = [row.id for row in rows if row.sizes - {common}]
    if others:
        scores.note(
            f"{counted(len(others), 'prompt')} with pictures of another size than most ({_text(common)}){where}: "
            f"{listed(others, _FEW)}"
        )
    return common


def note_two_sizes(scores: Scores, ours: tuple[int, int] | None, theirs: tuple[int, int] | None) -> None:
    """Note judged pictures and a reference of different sizes."""
    if ours and theirs and ours != theirs:
        scores.note(
            f"most pictures are {_text(ours)}, the reference's {_text(theirs)}: resizing is part of the distance"
        )


def _text(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)


def note_threshold(scores: Scores, preset: Preset, threshold: float, source: str) -> None:
    """Report the cosine from which near-duplicates count, in the figure and in a note."""
    scores.figures[f"{preset.full_name}.duplicate_rate"] |= {"threshold": threshold, "threshold_from": source}
    origin = "the 99th percentile of the reference's own" if source == "reference" else "the given value"
    scores.note(f"near-duplicates of {preset.full_name} have a cosine of at least {threshold:.7g}, {origin}")


def note_fid(scores: Scores, n: dict[str, int]) -> None:
    """Note the limits of FID at these numbers of pictures."""
    fewer, more = sorted((n["pictures"], n["reference_pictures"]))
    if fewer < LARGEST:
        scores.note(f"FID of fewer than {LARGEST} pictures is too high: compare at equal numbers only")
    if more > LARGEST:
        scores.note(f"FID of more than {LARGEST} pictures has no interval: memory does not hold all their features")


def note_repeats(scores: Scores, preset: Preset, count: int) -> None:
    """Note pictures whose nearest neighbours are copies of them: nothing is inside the ball around them."""
    if count:
        scores.note(
            f"{count} pictures have {NEIGHBOURS} or more exact copies on their side: {preset.full_name} finds nothing "
            "near them, so its figures are too low"
        )
