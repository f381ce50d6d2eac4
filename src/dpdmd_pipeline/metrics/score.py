"""Any pictures, scored: every metric runs that can, and what could not is said.

A metric is one pass over the sets of pictures, one prompt in memory at a time. Prompts can be spread over processes;
a number depends on neither that nor on the size of batches (on the CPU).
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.distribution import LARGEST
from dpdmd_pipeline.metrics.diversity import duplicate_rate, duplicate_threshold
from dpdmd_pipeline.metrics.measures import NO_ANSWER, Measure, Measured, Row, measure_set
from dpdmd_pipeline.metrics.pictures import PictureSet
from dpdmd_pipeline.metrics.presets import Preset, Settings
from dpdmd_pipeline.metrics.summary import figure, gap_figure
from dpdmd_pipeline.metrics.weights import UnavailableError
from dpdmd_pipeline.wording import counted, listed

log = logging.getLogger(__name__)

_IN_FLIGHT = 4  # sets per process that are computed ahead
_MORE_IS_LESS_DIVERSE = ("duplicate_rate",)
_OF_ANY_NUMBER = ("one_minus_cosine", "mean_distance")  # means over pairs; all else of diversity depends on how many
_NAMED = 3  # prompts in a note
_IN_THE_REFERENCE = ", in the reference"
_TOO_MANY_UNPARSED = 0.5  # share of a metric's answers


@dataclass
class Reference:
    """What pictures are compared with: the teacher's, or real ones.

    Attributes:
        sets: one a prompt.
        duplicates: per preset, the number of pictures a prompt and the threshold they give; filled when first asked.
    """

    sets: Sequence[PictureSet]
    duplicates: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass
class Scores:
    """Everything that was measured of one folder of pictures, and everything that was not.

    Attributes:
        prompts, pictures: as found.
        figures: by full name, as in `diversity.dino_v2.vendi`.
        per_prompt: the same per id of a prompt, where it could be measured.
        missing: metrics that were asked for and could not be measured, with the reason.
        faults: what figures leave out: kind to names.
        notes: what a reader should know.
        usable: pictures that were measured, by metric and id of the prompt.
        weights: SHA-256 of what each metric looks through, by metric and name of the weights.
    """

    prompts: int
    pictures: int
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_prompt: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    usable: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    _seen: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add_faults(self, rows: Sequence[Row], preset: Preset, where: str = "") -> None:
        """Take over the rows' faults; those of a network are named after its metric.

        Args:
            rows: of some sets.
            preset: that measured them.
            where: the sets are, unless they are those that are judged.
        """
        for row in rows:
            for kind, name in row.faults:
                of = f" ({preset.full_name})" if "network" in kind else ""
                self._add_fault(f"{kind}{of}{where}", name)

    def _add_fault(self, kind: str, name: str) -> None:
        if (kind, name) not in self._seen:
            self._seen.add((kind, name))
            self.faults.setdefault(kind, []).append(name)

    def join(self, other: Scores) -> None:
        """Take over what other presets found of the same pictures."""
        self.figures |= other.figures
        self.per_prompt |= other.per_prompt
        self.missing |= other.missing
        self.usable |= other.usable
        self.weights |= other.weights
        for kind, names in other.faults.items():
            for name in names:
                self._add_fault(kind, name)
        for text in other.notes:
            self.note(text)

    def note(self, text: str) -> None:
        """Say something once."""
        if text not in self.notes:
            self.notes.append(text)


def score(
    sets: Sequence[PictureSet],
    presets: Sequence[Preset],
    settings: Settings,
    reference: Reference | None = None,
    pool: ProcessPoolExecutor | None = None,
) -> Scores:
    """Measure all presets that can be measured.

    Args:
        sets: pictures to judge, one set a prompt.
        presets: what to measure.
        settings: how.
        reference: the teacher's pictures, or real ones: for the distribution, and for what a near-duplicate is.
        pool: of `workers`, for several calls to share; without one, each call has its own.

    Raises:
        ValueError: if two sets have the same id.
        OSError: if a process was killed.
    """
    twice = [name for name, count in Counter(one.id for one in sets).items() if count > 1]
    if twice:
        raise ValueError(f"prompt id {twice[0]!r} is given to more than one set of pictures: join them")
    scores = Scores(len(sets), sum(map(len, sets)))
    if len(sets) == 1:
        scores.note("one prompt only: a figure without an interval says nothing about other prompts")
    with nullcontext(pool) if pool else workers(settings) as shared:
        for preset in presets:
            add = _add_distribution if preset.axis == "distribution" else _add_metric
            with _noted_if_it_fails(scores, preset):
                add(scores, _Pass(preset, measuring(preset, settings, shared), sets, settings, reference))
                if preset.weights:
                    scores.weights[preset.full_name] = preset.digests(settings)
    return scores


@contextmanager
def _noted_if_it_fails(scores: Scores, preset: Preset) -> Iterator[None]:
    """Keep why a metric could not be measured: one that cannot run must not cost the others.

    Raises:
        OSError: if a process was killed.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise OSError(f"a process was killed at {preset.full_name}, for memory perhaps: use fewer processes") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # of torch, and perhaps a fault of ours
            log.warning("%s has failed", preset.full_name, exc_info=True)
        scores.missing[preset.full_name] = " ".join(str(error).split()).removeprefix(f"{preset.full_name} ")


Measuring = Callable[[Sequence[PictureSet]], Iterator[Row]]


def measuring(preset: Preset, settings: Settings, pool: ProcessPoolExecutor | None) -> Measuring:
    """From sets to one row each, in their order, whatever the number of processes; a model is loaded once in each.

    Raises:
        MissingWeightsError, MissingLibraryError: before any picture is read.
    """
    if pool is None:
        measure = preset.make(settings)
        return lambda sets: map(partial(measure_set, measure, needs_text=preset.needs_text), sets)
    preset.require(settings)
    return partial(_spread, pool, _IN_FLIGHT * settings.processes, preset)


@contextmanager
def workers(settings: Settings) -> Iterator[ProcessPoolExecutor | None]:
    """The processes over which prompts are spread, started when first needed; None for one, which is this one."""
    if settings.processes == 1:
        yield None
        return
    with ProcessPoolExecutor(settings.processes, get_context("spawn"), _remember, (settings,)) as pool:
        yield pool


def _spread(pool: ProcessPoolExecutor, at_once: int, preset: Preset, sets: Sequence[PictureSet]) -> Iterator[Row]:
    for start in range(0, len(sets), at_once):
        yield from pool.map(partial(_measure_here, preset), sets[start : start + at_once])


# Of a worker: its settings, and the measure it is at, so that one model at a time is in memory.
_settings: list[Settings] = []
_current: dict[str, Measure] = {}


def _remember(settings: Settings) -> None:
    _settings[:] = [settings]


def _measure_here(preset: Preset, pictures: PictureSet) -> Row:
    if preset.full_name not in _current:
        _current.clear()
        _current[preset.full_name] = preset.make(_settings[0])
    return measure_set(_current[preset.full_name], pictures, preset.needs_text)


@dataclass(frozen=True)
class _Pass:
    """One preset over the pictures to judge, and over those that they are compared with.

    Attributes:
        preset: what is measured.
        rows_of: measures sets, in their order.
        sets: to judge, one a prompt.
        settings: how.
        reference: what they are compared with, if there is anything.
    """

    preset: Preset
    rows_of: Measuring
    sets: Sequence[PictureSet]
    settings: Settings
    reference: Reference | None

    @property
    def is_of_the_reference(self) -> bool:
        """Whether the pictures to judge are the reference itself, as where the teacher's own are judged."""
        return self.reference is not None and self.sets is self.reference.sets


def _add_metric(scores: Scores, asked: _Pass) -> None:
    rows = list(asked.rows_of(asked.sets))
    if rows and all(row.unfit for row in rows):
        raise UnavailableError(rows[0].unfit)
    scores.add_faults(rows, asked.preset)
    _check_answers(rows)
    values = {row.id: dict(row.measured.values) for row in rows}
    threshold = None
    if any(row.measured.nearest is not None for row in rows):
        threshold = _duplicates_above(scores, asked, rows)
        for row in rows:
            if threshold is not None and row.measured.nearest is not None:
                values[row.id]["duplicate_rate"] = duplicate_rate(row.measured.nearest, threshold)
    names = dict.fromkeys(name for found in values.values() for name in found)
    _check_names(names, asked)
    for name in names:
        _add_figure(scores, asked, name, {key: found.get(name, math.nan) for key, found in values.items()}, rows)
    _note_rows(scores, asked.preset, rows)
    if threshold is not None:
        source = "reference" if asked.settings.duplicates_above is None else "user"
        _note_threshold(scores, asked.preset, threshold, source)


def _check_answers(rows: Sequence[Row]) -> None:
    """Refuse a mean over the few answers that parsed.

    Raises:
        UnavailableError: if most did not.
    """
    unparsed = sum(len(row.measured.unusable) for row in rows if row.measured.why == NO_ANSWER)
    answers = unparsed + sum(row.pictures for row in rows)
    if unparsed > _TOO_MANY_UNPARSED * answers:
        raise UnavailableError(
            f"{unparsed} of {answers} answers did not parse, and the mean of the others says nothing: "
            "see whether the weights are those of the model that was asked for"
        )


def _check_names(names: Collection[str], asked: _Pass) -> None:
    """Refuse a metric that gave no number of any prompt.

    Raises:
        UnavailableError: names the reason, if it is known.
    """
    if names:
        return
    if asked.preset.needs_text and all(one.no_text for one in asked.sets):
        raise UnavailableError("no prompt has a text: give --prompts FILE, or a prompt.txt in each prompt's folder")
    raise UnavailableError("no prompt could be measured: see what is wrong with the pictures")


def _note_rows(scores: Scores, preset: Preset, rows: Sequence[Row]) -> None:
    """Keep the numbers of usable pictures, and say what they and the lengths of prompts do to the figures."""
    scores.usable[preset.full_name] = {row.id: row.pictures for row in rows if row.pictures}
    sizes = Counter(scores.usable[preset.full_name].values())
    if preset.axis == "diversity" and len(sizes) > 1:
        spread = ", ".join(f"{counted(count, 'prompt')} with {size}" for size, count in sorted(sizes.items()))
        scores.note(f"unequal numbers of usable pictures a prompt ({spread}): Vendi and near-duplicates depend on them")
    _note_sizes(scores, rows, "")
    limits = [row.measured.cut_at for row in rows if row.measured.cut_at is not None]
    if limits:
        told = f"{len(limits)} of {len(rows)} prompts are longer than {limits[0]} tokens and were cut"
        scores.note(f"{told} ({preset.full_name})")


def _note_sizes(scores: Scores, rows: Sequence[Row], where: str) -> tuple[int, int] | None:
    """Name prompts whose pictures are not of the size that most have, which is returned: a metric sees less of some."""
    counts = Counter(size for row in rows for size in row.sizes)
    if not counts:
        return None
    most = counts.most_common(1)[0][0]
    others = [row.id for row in rows if row.sizes - {most}]
    if others:
        told = f"{counted(len(others), 'prompt')} with pictures of another size than most ({_text(most)}){where}"
        scores.note(f"{told}: {listed(others, _NAMED)}")
    return most


def _text(size: tuple[int, int]) -> str:
    return "{} x {}".format(*size)


def _note_threshold(scores: Scores, preset: Preset, threshold: float, source: str) -> None:
    """Say above which cosine near-duplicates were counted: a rate means nothing without it."""
    scores.figures[f"{preset.full_name}.duplicate_rate"] |= {"threshold": threshold, "threshold_from": source}
    origin = "the 99th percentile of the reference's own" if source == "reference" else "as given"
    scores.note(f"near-duplicates of {preset.full_name} have a cosine of at least {threshold:.7g}, {origin}")


def _add_figure(scores: Scores, asked: _Pass, name: str, values: dict[str, float], rows: Sequence[Row]) -> None:
    full_name = f"{asked.preset.full_name}.{name}"
    per_prompt = torch.tensor(list(values.values()), dtype=torch.float64)
    pictures = sum(row.pictures for row in rows)
    scores.figures[full_name] = figure(per_prompt, pictures, asked.preset.protocol, asked.settings.seed)
    scores.per_prompt[full_name] = {key: value for key, value in values.items() if not math.isnan(value)}


def _duplicates_above(scores: Scores, asked: _Pass, rows: Sequence[Row]) -> float | None:
    """The cosine from which pictures are near-duplicates; None, and a note, where nothing says it."""
    if asked.settings.duplicates_above is not None:
        return asked.settings.duplicates_above
    if asked.reference is None:
        scores.note(
            "near-duplicates were not counted: name the teacher's pictures with --reference, "
            "or a cosine with --duplicates-above"
        )
        return None
    known, name = asked.reference.duplicates, asked.preset.full_name
    if name not in known:
        known[name] = _duplicates_of_the_reference(scores, asked, rows)
    (wanted, threshold), count = known[name], _usual_count(rows)
    if wanted != count:
        scores.note(
            f"near-duplicates were not counted: the reference has {wanted} pictures a prompt, not {count}, "
            "and the threshold grows with their number"
        )
        return None
    return threshold


def _duplicates_of_the_reference(scores: Scores, asked: _Pass, rows: Sequence[Row]) -> tuple[int, float]:
    """The reference's number of pictures a prompt, and the threshold that they give.

    Args:
        rows: of the pictures to judge, which are not measured again where they are the reference.
    """
    if not asked.is_of_the_reference:
        rows = list(asked.rows_of(asked.reference.sets))
        scores.add_faults(rows, asked.preset, _IN_THE_REFERENCE)
    found = [row for row in rows if row.pictures]
    nearest = [row.measured.nearest for row in found if row.measured.nearest is not None]
    threshold = duplicate_threshold(torch.cat(nearest)) if nearest else math.nan
    return _usual_count(found), threshold


def _usual_count(rows: Sequence[Row]) -> int:
    """Pictures that most prompts have."""
    most = Counter(row.pictures for row in rows if row.pictures).most_common(1)
    return most[0][0] if most else 0


def _add_distribution(scores: Scores, asked: _Pass) -> None:
    from dpdmd_pipeline.metrics.compare import Side, figures_of

    if asked.reference is None:
        raise UnavailableError("it compares with other pictures: name them with --reference FOLDER")
    preset, seed, compared = asked.preset, asked.settings.seed, (asked.reference.sets, asked.sets)
    sides = [Side(_count(sets), seed) for sets in compared]
    where = "" if asked.is_of_the_reference else _IN_THE_REFERENCE
    seen: list[list[Row]] = [[], []]  # without their features
    streams = [
        side.keep(_followed(scores, preset, asked.rows_of(sets), place, rows))
        for side, sets, place, rows in zip(sides, compared, (where, ""), seen, strict=True)
    ]
    for name, found in figures_of(preset, sides, streams, seed).items():
        if isinstance(found, str):
            scores.missing[f"{preset.full_name}.{name}"] = found
        else:
            scores.figures[f"{preset.full_name}.{name}"] = found
            if name == "fid":
                _note_fid(scores, found["n"])
    theirs, ours = (_note_sizes(scores, rows, place) for rows, place in zip(seen, (where, ""), strict=True))
    if theirs != ours and theirs and ours:
        scores.note(
            f"most pictures are {_text(ours)}, the reference's {_text(theirs)}: resizing is part of the distance"
        )


def _note_fid(scores: Scores, n: dict[str, int]) -> None:
    """Say what FID of so many pictures means."""
    fewer, more = sorted((n["pictures"], n["reference_pictures"]))
    if fewer < LARGEST:
        scores.note(f"FID of fewer than {LARGEST} pictures is too high: compare at equal numbers only")
    if more > LARGEST:
        scores.note(f"FID of more than {LARGEST} pictures has no interval: the features of so many are not kept")


def _count(sets: Sequence[PictureSet]) -> int:
    """Pictures of all sets, as found."""
    return sum(map(len, sets))


def _followed(scores: Scores, preset: Preset, rows: Iterator[Row], where: str, seen: list[Row]) -> Iterator[Tensor]:
    """Features of rows that pass by, their faults noted with where they are; the rows are kept without them."""
    for row in rows:
        scores.add_faults([row], preset, where)
        features = row.measured.features
        seen.append(row._replace(measured=Measured({})))
        yield torch.empty(0, 0) if features is None else features


def gaps_recovered(teacher: Scores, dmd: Scores, ours: Scores, seed: int) -> dict[str, dict[str, Any]]:
    """Share of DMD's loss that ours gets back, for every diversity metric that all three have.

    Prompts are compared with themselves: those that one of the three could not measure are left out of all, and of
    what depends on the number of pictures also those of which the three could not use equally many.

    Returns:
        by full name of the figure: value, low, high, prompts, preset.
    """
    found = {}
    for name in _diversity_of(ours):
        prompts, _ = _compared(name, teacher, dmd, ours)
        if not prompts:
            continue
        sign = -1 if name.rsplit(".", 1)[1] in _MORE_IS_LESS_DIVERSE else 1
        tables = [scores.per_prompt[name] for scores in (teacher, dmd, ours)]
        rows = [sign * torch.tensor([table[key] for key in prompts], dtype=torch.float64) for table in tables]
        found[name] = gap_figure(*rows, seed) | {"prompts": len(prompts), "preset": ours.figures[name]["preset"]}
    return found


def gap_notes(teacher: Scores, dmd: Scores, ours: Scores) -> list[str]:
    """One line a reason why gaps lack prompts, or are not there at all; a gap without a line is over all prompts."""
    reasons: dict[str, list[str]] = {}
    for name in _diversity_of(ours):
        prompts, uneven = _compared(name, teacher, dmd, ours)
        if uneven:
            told = f"{uneven} of {len(prompts) + uneven} prompts are left out of the gap, which depends on the number"
            reasons.setdefault(f"{told} of usable pictures: it is not the same in all three", []).append(name)
        elif not prompts:
            reasons.setdefault("no gap: no prompt was measured in all three", []).append(name)
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


def _diversity_of(scores: Scores) -> list[str]:
    return [name for name in scores.per_prompt if name.startswith("diversity.")]


def _compared(name: str, *models: Scores) -> tuple[list[str], int]:
    """Prompts over which models are compared by a figure, and how many more would be but for unequal numbers."""
    tables = [scores.per_prompt.get(name, {}) for scores in models]
    shared = [key for key in tables[-1] if all(key in table for table in tables)]
    metric, number = name.rsplit(".", 1)
    if number in _OF_ANY_NUMBER:
        return shared, 0
    usable = [scores.usable.get(metric, {}) for scores in models]
    equal = [key for key in shared if len({table.get(key) for table in usable}) == 1]
    return equal, len(shared) - len(equal)
