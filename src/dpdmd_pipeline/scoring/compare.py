"""Compare the features of judged pictures with those of a reference, one prompt in memory at a time."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.metrics import distribution
from dpdmd_pipeline.metrics.errors import MissingLibraryError, UnavailableError
from dpdmd_pipeline.metrics.measures import Measured
from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.scores import Row, Scores
from dpdmd_pipeline.scoring.sets import PictureSet
from dpdmd_pipeline.scoring.workers import IN_THE_REFERENCE, Job

log = logging.getLogger(__name__)

_ROWS = 1024  # features per update of torchmetrics, however many a prompt has
_NO_PICTURE = "one side has no usable picture"


def add_distribution(scores: Scores, job: Job) -> None:
    """Add the figures of a metric that compares two distributions: inception or dino_v2."""
    if job.reference is None:
        raise UnavailableError("it compares with other pictures: name them with --reference FOLDER")
    preset, seed = job.preset, job.settings.seed
    where = "" if job.judges_the_reference else IN_THE_REFERENCE
    sides = [Side(job.reference.sets, where, seed), Side(job.sets, "", seed)]
    streams = [side.features_of(scores, job) for side in sides]
    compute = _inception_figures if preset.name == "inception" else _neighbour_figures
    figures = compute(sides, streams, seed)
    n = {"prompts": sides[1].prompts, "pictures": sides[1].pictures, "reference_pictures": sides[0].pictures}
    for name, figure in figures.items():
        if isinstance(figure, str):
            scores.missing[f"{preset.full_name}.{name}"] = figure
            continue
        complete = {"low": None, "high": None, **figure, "preset": preset.protocol} | {"n": n | figure.get("n", {})}
        scores.figures[f"{preset.full_name}.{name}"] = complete
    _note_limits(scores, preset, sides, figures)
    theirs, ours = (scores.note_sizes(side.rows, side.where) for side in sides)
    if ours and theirs and ours != theirs:
        scores.note(f"most pictures are {ours}, the reference's {theirs}: resizing is part of the distance")


def _note_limits(scores: Scores, preset: Preset, sides: Sequence[Side], figures: dict[str, Any]) -> None:
    """Note what numbers of pictures do to FID, and copies around which no ball holds anything."""
    if isinstance(figures.get("fid"), dict):
        fewer, more = sorted(side.pictures for side in sides)
        if fewer < distribution.LARGEST:
            scores.note(f"FID of fewer than {distribution.LARGEST} pictures is too high: compare at equal numbers only")
        if more > distribution.LARGEST:
            scores.note(
                f"FID of more than {distribution.LARGEST} pictures has no interval: memory does not hold all their "
                "features"
            )
    if isinstance(figures.get("precision"), dict):
        size = figures["precision"]["n"]["compared"]
        if count := sum(distribution.count_repeats(side.sample(size)[0]) for side in sides):
            scores.note(
                f"{count} pictures have {distribution.NEIGHBOURS} or more exact copies on their side: "
                f"{preset.full_name} finds nothing near them, so its figures are too low"
            )


class Side:
    """One side of a comparison: it passes features on and stores a sample of them.

    The sample depends only on positions among all pictures, usable or not, and on the seed.

    Args:
        sets: sets of pictures.
        where: their location, after a kind of fault.
    """

    def __init__(self, sets: Sequence[PictureSet], where: str, seed: int) -> None:
        self.sets, self.where, self.seed = sets, where, seed
        total = sum(map(len, sets))
        order = torch.randperm(total, generator=self._generator())
        self.in_sample = torch.zeros(total, dtype=torch.bool)
        self.in_sample[order[: distribution.LARGEST]] = True
        self.pictures = self.prompts = 0
        self.rows: list[Row] = []  # without features
        self.features: list[Tensor] = []
        self.owners: list[int] = []

    def features_of(self, scores: Scores, job: Job) -> Iterator[Tensor]:
        """Measure the sets and pass on their features [n, d], in chunks of many rows; add the faults to the scores."""
        chunk: list[Tensor] = []
        for row in job.rows_of(self.sets):
            scores.add_faults([row], job.preset, self.where)
            if row.measured.features is not None and len(row.measured.features):
                self._store(row.measured.features)
                chunk.append(row.measured.features)
            self.rows.append(row._replace(measured=Measured({})))
            if sum(map(len, chunk)) >= _ROWS:
                yield torch.cat(chunk)
                chunk = []
        if chunk:
            yield torch.cat(chunk)

    def _store(self, features: Tensor) -> None:
        in_sample = self.in_sample[self.pictures : self.pictures + len(features)]
        self.features.append(features[in_sample].clone())
        self.owners += [len(self.rows)] * int(in_sample.sum())
        self.pictures += len(features)
        self.prompts += 1

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """At most `size` stored features [size, d], without replacement, and the numbers of their prompts [size].

        They are always the same ones in the same order.
        """
        features = torch.cat(self.features)
        order = torch.randperm(len(features), generator=self._generator())[:size]
        return features[order], torch.tensor(self.owners)[order]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def _inception_figures(sides: Sequence[Side], streams: Sequence[Iterator[Tensor]], seed: int) -> dict[str, Any]:
    """FID and KID, or the reason why there is none, from features of the reference and of the judged pictures.

    Their intervals resample the judged prompts and leave the reference fixed.
    """
    fid = _or_reason(lambda: {"value": distribution.frechet_distance(*streams)})

    def kid() -> dict[str, Any]:
        samples = [side.sample(distribution.LARGEST)[0] for side in sides if side.features]
        if len(samples) < len(sides):
            raise UnavailableError(_NO_PICTURE)
        value, spread = distribution.kernel_distance(*samples, seed)
        compared = min(map(len, samples))
        n = {"compared": compared, "subset": min(distribution.KID_SUBSET_SIZE, compared)}
        return {"value": value, "subset_std": spread, "n": n}

    # FID uses all pictures: an interval from the stored sample alone would be too wide.
    if all(side.pictures <= distribution.LARGEST for side in sides):
        fid = _with_interval(fid, distribution.frechet_influence, sides, seed, least=0.0)
    return {"fid": fid, "kid": _with_interval(_or_reason(kid), distribution.kernel_influence, sides, seed)}


def _with_interval(
    figure: dict[str, Any] | str,
    influence: Callable[[Tensor, Tensor], Tensor],
    sides: Sequence[Side],
    seed: int,
    least: float = -math.inf,
) -> dict[str, Any] | str:
    """Add the interval to a figure if it can be computed, with no end below `least`."""
    if isinstance(figure, str):
        return figure
    (real, _), (fake, owners) = (side.sample(distribution.LARGEST) for side in sides)
    try:
        marks = figure["value"] + influence(real, fake)
    except RuntimeError as error:  # from torch's decompositions
        log.warning("no interval: %s", error)
        return figure
    interval = ratio_interval(marks, owners, seed)
    low = None if interval["low"] is None else max(interval["low"], least)
    return {**interval, "low": low, **figure}


def _neighbour_figures(sides: Sequence[Side], streams: Sequence[Iterator[Tensor]], seed: int) -> dict[str, Any]:
    """Precision, recall, density and coverage, at equal numbers of pictures."""
    for stream in streams:
        deque(stream, maxlen=0)  # fills the side
    names = ("precision", "recall", "density", "coverage")

    size = min(sum(map(len, side.features)) for side in sides)
    if not size:
        return dict.fromkeys(names, _NO_PICTURE)
    (real, real_owner), (fake, fake_owner) = (side.sample(size) for side in sides)
    try:
        marks_of = distribution.prdc(real, fake)
    except UnavailableError as error:
        return dict.fromkeys(names, str(error))
    owners = (fake_owner, real_owner, fake_owner, real_owner)
    return {
        name: ratio_interval(marks, owner, seed) | {"n": {"compared": size}}
        for name, marks, owner in zip(names, marks_of, owners, strict=True)
    }


def _or_reason(compute: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    try:
        return compute()
    except MissingLibraryError:
        raise
    except UnavailableError as error:
        return str(error)
