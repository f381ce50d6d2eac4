"""Run metrics on sets of pictures: every metric that can run does, and the others give a reason.

A metric is one pass over the sets, with one prompt in memory at a time. Processes can share the prompts; numbers depend
neither on that nor, on the CPU, on the batch size.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, nullcontext

import torch

from dpdmd_pipeline.metrics.diversity import duplicate_rate
from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.measures import NO_ANSWER
from dpdmd_pipeline.metrics.summary import figure
from dpdmd_pipeline.scoring.compare import add_distribution
from dpdmd_pipeline.scoring.duplicates import duplicates_above
from dpdmd_pipeline.scoring.notes import note_cut_prompts, note_numbers, note_sizes, note_threshold
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.rows import Row
from dpdmd_pipeline.scoring.scores import Reference, Scores
from dpdmd_pipeline.scoring.sets import PictureSet
from dpdmd_pipeline.scoring.workers import Job, measuring, workers
from dpdmd_pipeline.wording import one_line

log = logging.getLogger(__name__)

_MAX_UNPARSED = 0.5  # share of a metric's answers


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
        presets: metrics to run.
        settings: settings of all metrics.
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
            with _failure_as_missing(scores, preset):
                add(scores, Job(preset, measuring(preset, settings, shared), sets, settings, reference))
                if preset.weights:
                    scores.weights[preset.full_name] = preset.digests(settings)
    return scores


@contextmanager
def _failure_as_missing(scores: Scores, preset: Preset) -> Iterator[None]:
    """Record the failure of one metric as the reason why it is missing, and go on with the others.

    Raises:
        OSError: if a process was killed.
    """
    try:
        yield
    except BrokenProcessPool as error:
        raise OSError(f"a process was killed at {preset.full_name}, perhaps for memory: use fewer processes") from error
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        if isinstance(error, RuntimeError):  # from torch, or a bug of this project
            log.warning("%s has failed", preset.full_name, exc_info=True)
        scores.missing[preset.full_name] = one_line(error).removeprefix(f"{preset.full_name} ")


def _add_metric(scores: Scores, job: Job) -> None:
    """Add the figures of a metric that judges each prompt by itself."""
    rows = list(job.rows_of(job.sets))
    if rows and all(row.unfit for row in rows):
        raise UnavailableError(rows[0].unfit)
    scores.add_faults(rows, job.preset)
    _require_answers(rows)
    values = {row.id: dict(row.measured.values) for row in rows}
    threshold = None
    if any(row.measured.nearest is not None for row in rows):
        threshold = duplicates_above(scores, job, rows)
    if threshold is not None:
        for row in rows:
            if row.measured.nearest is not None:
                values[row.id]["duplicate_rate"] = duplicate_rate(row.measured.nearest, threshold)
    names = dict.fromkeys(name for numbers in values.values() for name in numbers)
    if not names:
        raise UnavailableError(_why_no_number(job))
    for name in names:
        _add_figure(scores, job, name, {key: numbers.get(name, math.nan) for key, numbers in values.items()}, rows)
    scores.usable[job.preset.full_name] = {row.id: row.pictures for row in rows if row.pictures}
    note_numbers(scores, job.preset)
    note_sizes(scores, rows)
    note_cut_prompts(scores, job.preset, rows)
    if threshold is not None:
        source = "reference" if job.settings.duplicates_above is None else "user"
        note_threshold(scores, job.preset, threshold, source)


def _require_answers(rows: Sequence[Row]) -> None:
    """Refuse a mean over the few answers that parsed.

    Raises:
        UnavailableError: if most answers did not parse.
    """
    unparsed = sum(len(row.measured.unusable) for row in rows if row.measured.why == NO_ANSWER)
    answers = unparsed + sum(row.pictures for row in rows)
    if unparsed > _MAX_UNPARSED * answers:
        raise UnavailableError(
            f"{unparsed} of {answers} answers did not parse, so the mean of the others means nothing: "
            "check that the weights are those of this model"
        )


def _why_no_number(job: Job) -> str:
    if job.preset.needs_text and all(one.no_text for one in job.sets):
        return "no prompt has a text: give --prompts FILE, or a prompt.txt in each prompt's folder"
    return "no prompt could be measured: check the faults of the pictures"


def _add_figure(scores: Scores, job: Job, name: str, values: dict[str, float], rows: Sequence[Row]) -> None:
    full_name = f"{job.preset.full_name}.{name}"
    per_prompt = torch.tensor(list(values.values()), dtype=torch.float64)
    pictures = sum(row.pictures for row in rows)
    scores.figures[full_name] = figure(per_prompt, pictures, job.preset.protocol, job.settings.seed)
    scores.per_prompt[full_name] = {key: value for key, value in values.items() if not math.isnan(value)}
