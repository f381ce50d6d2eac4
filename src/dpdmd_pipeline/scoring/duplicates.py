"""The cosine from which two pictures of a prompt are near-duplicates, taken from the reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from dpdmd_pipeline.metrics.diversity import duplicate_threshold
from dpdmd_pipeline.scoring.rows import Row
from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.scoring.workers import IN_THE_REFERENCE, Job

_NOT_COUNTED = "near-duplicates were not counted: "


def duplicates_above(scores: Scores, job: Job, rows: Sequence[Row]) -> float | None:
    """Cosine from which pictures are near-duplicates; None, with a note, if there is no valid one."""
    if job.settings.duplicates_above is not None:
        return job.settings.duplicates_above
    if job.reference is None:
        scores.note(f"{_NOT_COUNTED}name the teacher's pictures with --reference, or a cosine with --duplicates-above")
        return None
    thresholds, name = job.reference.duplicates, job.preset.full_name
    if name not in thresholds:
        thresholds[name] = _from_reference(scores, job, rows)
    (reference_count, threshold), count = thresholds[name], _usual_count(rows)
    if reference_count != count:
        scores.note(
            f"{_NOT_COUNTED}the reference has {reference_count} pictures per prompt, not {count}, and the threshold "
            "grows with their number"
        )
        return None
    return threshold


def _from_reference(scores: Scores, job: Job, rows: Sequence[Row]) -> tuple[int, float]:
    """The reference's number of pictures per prompt, and their threshold.

    Args:
        scores: collects the reference's faults.
        job: the preset and the reference.
        rows: rows of the judged pictures, reused if they are the reference.
    """
    if not job.judges_the_reference:
        rows = list(job.rows_of(job.reference.sets))
        scores.add_faults(rows, job.preset, IN_THE_REFERENCE)
    measured = [row for row in rows if row.pictures]
    nearest = [row.measured.nearest for row in measured if row.measured.nearest is not None]
    threshold = duplicate_threshold(torch.cat(nearest)) if nearest else math.nan
    return _usual_count(measured), threshold


def _usual_count(rows: Sequence[Row]) -> int:
    """The most frequent number of pictures per prompt."""
    most = Counter(row.pictures for row in rows if row.pictures).most_common(1)
    return most[0][0] if most else 0
