"""Compare the features of judged pictures with those of a reference, one prompt in memory at a time."""

from __future__ import annotations

import logging
import math
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
from dpdmd_pipeline.scoring.workers import IN_THE_REFERENCE, Job

log = logging.getLogger(__name__)

_ROWS = 1024  # features per update of torchmetrics, however many a prompt has
_NO_PICTURE = "one side has no usable picture"


def add_distribution(scores: Scores, job: Job) -> None:
    """Add the figures of a metric that compares two distributions: inception or dino_v2."""
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
    theirs, ours = (scores.note_sizes(done, where) for done, where in zip(rows, wheres, strict=True))
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


def _features(scores: Scores, preset: Preset, rows: Iterator[Row], where: str, done: list[Row]) -> Iterator[Tensor]:
    """Yield the features of rows, add their faults, and append the rows without features to `done`."""
    for row in rows:
        scores.add_faults([row], preset, where)
        features = row.measured.features
        done.append(row._replace(measured=Measured({})))
        yield torch.empty(0, 0) if features is None else features


class Side:
    """One side of a comparison: it passes features on and stores a sample of them.

    The sample depends only on positions among the `total` of pictures, usable or not, and on the seed.
    """

    def __init__(self, total: int, seed: int) -> None:
        self.seed = seed
        order = torch.randperm(total, generator=self._generator())
        self.in_sample = torch.zeros(total, dtype=torch.bool)
        self.in_sample[order[: distribution.LARGEST]] = True
        self.pictures = self.prompts = 0
        self.features: list[Tensor] = []
        self.owners: list[int] = []

    def keep(self, stream: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass on the features [n, d] of one prompt after the other, in chunks of many rows."""
        chunk: list[Tensor] = []
        for number, features in enumerate(stream):
            if len(features):
                self._store(number, features)
                chunk.append(features)
            if sum(map(len, chunk)) >= _ROWS:
                yield torch.cat(chunk)
                chunk = []
        if chunk:
            yield torch.cat(chunk)

    def _store(self, prompt: int, features: Tensor) -> None:
        in_sample = self.in_sample[self.pictures : self.pictures + len(features)]
        self.features.append(features[in_sample].clone())
        self.owners += [prompt] * int(in_sample.sum())
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
        for _ in stream:  # fills the side
            pass
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
