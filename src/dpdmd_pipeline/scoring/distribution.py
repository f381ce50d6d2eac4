"""Compare the features of judged pictures with those of a reference, one prompt in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.measures import Measured
from dpdmd_pipeline.scoring.compare import Side, figures_of
from dpdmd_pipeline.scoring.job import IN_THE_REFERENCE, Job
from dpdmd_pipeline.scoring.notes import note_fid, note_sizes, note_two_sizes
from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.rows import Row
from dpdmd_pipeline.scoring.scores import Scores


def add_distribution(scores: Scores, job: Job) -> None:
    """Add the figures of a metric that compares two distributions.

    Raises:
        UnavailableError: without a reference.
    """
    if job.reference is None:
        raise UnavailableError("it compares with other pictures: name them with --reference FOLDER")
    preset, seed, compared = job.preset, job.settings.seed, (job.reference.sets, job.sets)
    wheres = ("" if job.judges_the_reference else IN_THE_REFERENCE, "")
    sides = [Side(sum(map(len, sets)), seed) for sets in compared]
    rows: list[list[Row]] = [[], []]  # filled on the way, without features
    streams = [
        side.keep(_features(scores, preset, job.rows_of(sets), where, done))
        for side, sets, where, done in zip(sides, compared, wheres, rows, strict=True)
    ]
    for name, figure in figures_of(preset, sides, streams, seed).items():
        if isinstance(figure, str):
            scores.missing[f"{preset.full_name}.{name}"] = figure
        else:
            scores.figures[f"{preset.full_name}.{name}"] = figure
            if name == "fid":
                note_fid(scores, figure["n"])
    theirs, ours = (note_sizes(scores, done, where) for done, where in zip(rows, wheres, strict=True))
    note_two_sizes(scores, ours, theirs)


def _features(scores: Scores, preset: Preset, rows: Iterator[Row], where: str, done: list[Row]) -> Iterator[Tensor]:
    """Yield the features of rows, add their faults, and append the rows without features to `done`."""
    for row in rows:
        scores.add_faults([row], preset, where)
        features = row.measured.features
        done.append(row._replace(measured=Measured({})))
        yield torch.empty(0, 0) if features is None else features
