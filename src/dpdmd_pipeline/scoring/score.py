"""Run metrics on sets of pictures: every metric that can run does, and the others give a reason.

A metric is one pass over the sets, with one prompt in memory at a time. Numbers depend neither on the number of
processes that share the prompts nor, on the CPU, on the batch size.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext

import torch

from dpdmd_pipeline.metrics.diversity import duplicate_rate, duplicate_threshold
from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.measures import NO_ANSWER
from dpdmd_pipeline.metrics.summary import figure
from dpdmd_pipeline.scoring.compare import add_distribution
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.scores import Reference, Row, Scores
from dpdmd_pipeline.scoring.sets import PictureSet
from dpdmd_pipeline.scoring.workers import IN_THE_REFERENCE, Job, measuring, workers
from dpdmd_pipeline.wording import counted, one_line

log = logging.getLogger(__name__)

_MAX_UNPARSED = 0.5  # share of a metric's answers
_NOT_COUNTED = "near-duplicates were not counted: "


def score(
    sets: Sequence[PictureSet],
    presets: Sequence[Preset],
    settings: Settings,
    reference: Reference | None = None,
    pool: ProcessPoolExecutor | None = None,
) -> Scores:
    """Run all presets that can run.

    Args:
        sets: judged pictures, one set per prompt.
        reference: the teacher's pictures or real ones, for distributions and for the threshold of near-duplicates.
        pool: pool of `workers` that several calls share; without one, each call starts its own.

    Raises:
        ValueError: if two sets have the same id.
        OSError: if a process was killed.
    """
    duplicates = [name for name, count in Counter(one.id for one in sets).items() if count > 1]
    if duplicates:
        raise ValueError(f"more than one set of pictures has the prompt id {duplicates[0]!r}: join them")
    scores = Scores(len(sets), sum(map(len, sets)))
    if len(sets) == 1:
        scores.note("one prompt only: a figure without an interval says nothing about other prompts")
    with nullcontext(pool) if pool else workers(settings) as shared:
        for preset in presets:
            add = add_distribution if preset.axis == "distribution" else _add_metric
            try:
                add(scores, Job(preset, measuring(preset, settings, shared), sets, settings, reference))
                if preset.weights:
                    scores.weights[preset.full_name] = preset.digests(settings)
            except BrokenProcessPool as error:
                cause = f"a process was killed at {preset.full_name}, perhaps for memory"
                raise OSError(f"{cause}: use fewer processes") from error
            except (OSError, ValueError, ImportError, RuntimeError) as error:  # go on with the other metrics
                if isinstance(error, RuntimeError):  # from torch, or a bug of this project
                    log.warning("%s has failed", preset.full_name, exc_info=True)
                scores.missing[preset.full_name] = one_line(error).removeprefix(f"{preset.full_name} ")
    return scores


def _add_metric(scores: Scores, job: Job) -> None:
    """Add the figures of a metric that judges each prompt by itself."""
    rows = list(job.rows_of(job.sets))
    if rows and all(row.unfit for row in rows):
        raise UnavailableError(rows[0].unfit)
    scores.add_faults(rows, job.preset)
    unparsed = sum(len(row.measured.unusable) for row in rows if row.measured.why == NO_ANSWER)
    answers = unparsed + sum(row.pictures for row in rows)
    if unparsed > _MAX_UNPARSED * answers:
        raise UnavailableError(
            f"{unparsed} of {answers} answers did not parse, so the mean of the others means nothing: "
            "check that the weights are those of this model"
        )
    values = {row.id: dict(row.measured.values) for row in rows}
    nearest = {row.id: row.measured.nearest for row in rows if row.measured.nearest is not None}
    threshold = _duplicates_above(scores, job, rows) if nearest else None
    if threshold is not None:
        for key, similarities in nearest.items():
            values[key]["duplicate_rate"] = duplicate_rate(similarities, threshold)
    names = dict.fromkeys(name for numbers in values.values() for name in numbers)
    if not names:
        if job.preset.needs_text and all(one.no_text for one in job.sets):
            raise UnavailableError("no prompt has a text: give --prompts FILE, or a prompt.txt in each prompt's folder")
        raise UnavailableError("no prompt could be measured: check the faults of the pictures")
    pictures = sum(row.pictures for row in rows)
    for name in names:
        full_name = f"{job.preset.full_name}.{name}"
        per_prompt = torch.tensor([numbers.get(name, math.nan) for numbers in values.values()], dtype=torch.float64)
        scores.figures[full_name] = figure(per_prompt, pictures, job.preset.protocol, job.settings.seed)
        scores.per_prompt[full_name] = {
            key: value for key, value in zip(values, per_prompt.tolist(), strict=True) if not math.isnan(value)
        }
    scores.usable[job.preset.full_name] = {row.id: row.pictures for row in rows if row.pictures}
    scores.note_sizes(rows)
    _note_limits(scores, job, rows, threshold)


def _note_limits(scores: Scores, job: Job, rows: Sequence[Row], threshold: float | None) -> None:
    """Note unequal numbers of pictures, prompts that were cut, and the cosine from which near-duplicates count."""
    name = job.preset.full_name
    sizes = Counter(scores.usable[name].values())
    if job.preset.axis == "diversity" and len(sizes) > 1:
        spread = ", ".join(f"{counted(count, 'prompt')} with {size}" for size, count in sorted(sizes.items()))
        scores.note(
            f"prompts have unequal numbers of usable pictures ({spread}): Vendi and near-duplicates depend on them"
        )
    if limits := [row.measured.cut_at for row in rows if row.measured.cut_at is not None]:
        scores.note(f"{len(limits)} of {len(rows)} prompts are longer than {limits[0]} tokens and were cut ({name})")
    if threshold is not None:
        source, origin = "user", "the given value"
        if job.settings.duplicates_above is None:
            source, origin = "reference", "the 99th percentile of the reference's own"
        scores.figures[f"{name}.duplicate_rate"] |= {"threshold": threshold, "threshold_from": source}
        scores.note(f"near-duplicates of {name} have a cosine of at least {threshold:.7g}, {origin}")


def _duplicates_above(scores: Scores, job: Job, rows: Sequence[Row]) -> float | None:
    """Cosine from which pictures are near-duplicates; None, with a note, if there is no valid one."""
    if job.settings.duplicates_above is not None:
        return job.settings.duplicates_above
    if job.reference is None:
        scores.note(f"{_NOT_COUNTED}name the teacher's pictures with --reference, or a cosine with --duplicates-above")
        return None
    thresholds, name = job.reference.duplicates, job.preset.full_name
    if name not in thresholds:
        thresholds[name] = _threshold_of_reference(scores, job, job.reference, rows)
    (reference_count, threshold), count = thresholds[name], _usual_count(rows)
    if reference_count != count:
        scores.note(
            f"{_NOT_COUNTED}the reference has {reference_count} pictures per prompt, not {count}, and the threshold "
            "grows with their number"
        )
        return None
    return threshold


def _threshold_of_reference(scores: Scores, job: Job, reference: Reference, rows: Sequence[Row]) -> tuple[int, float]:
    """The reference's number of pictures per prompt, and their threshold; `rows` are of the judged pictures."""
    if not job.judges_the_reference:
        rows = list(job.rows_of(reference.sets))
        scores.add_faults(rows, job.preset, IN_THE_REFERENCE)
    nearest = [row.measured.nearest for row in rows if row.pictures and row.measured.nearest is not None]
    return _usual_count(rows), duplicate_threshold(torch.cat(nearest)) if nearest else math.nan


def _usual_count(rows: Sequence[Row]) -> int:
    """The most frequent number of pictures per prompt."""
    most = Counter(row.pictures for row in rows if row.pictures).most_common(1)
    return most[0][0] if most else 0
