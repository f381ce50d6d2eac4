"""Two streams of features to the figures of a distribution preset."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.distribution import (
    KID_SUBSET_SIZE,
    LARGEST,
    frechet_distance,
    frechet_influence,
    kernel_distance,
    kernel_influence,
    prdc,
)
from dpdmd_pipeline.metrics.presets import Preset
from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.metrics.weights import MissingLibraryError, UnavailableError

log = logging.getLogger(__name__)

_ROWS = 1024  # features that torchmetrics sees at once, however many a prompt has


class Side:
    """One side of a comparison: what passes by, and a sample of it that is kept.

    Args:
        total: pictures as found; which are kept depends on their position alone.
        seed: of the sample, and of smaller ones that are drawn from it.
    """

    def __init__(self, total: int, seed: int) -> None:
        self.seed = seed
        order = torch.randperm(total, generator=self._generator())
        self.chosen = torch.zeros(total, dtype=torch.bool)
        self.chosen[order[:LARGEST]] = True
        self.pictures = self.prompts = 0
        self.features: list[Tensor] = []
        self.owners: list[int] = []

    def keep(self, stream: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass features [n, d] of one prompt after the other on, in portions of many rows."""
        waiting: list[Tensor] = []
        for number, features in enumerate(stream):
            if len(features):
                self._take(number, features)
                waiting.append(features)
            if sum(map(len, waiting)) >= _ROWS:
                yield torch.cat(waiting)
                waiting = []
        if waiting:
            yield torch.cat(waiting)

    def _take(self, prompt: int, features: Tensor) -> None:
        chosen = self.chosen[self.pictures : self.pictures + len(features)]
        self.features.append(features[chosen].clone())
        self.owners += [prompt] * int(chosen.sum())
        self.pictures += len(features)
        self.prompts += 1

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """At most `size` of the kept features, drawn without replacement, and the numbers of their prompts.

        Returns:
            [size, d] and [size], or as many as were kept; always the same ones in the same order.
        """
        features = torch.cat(self.features)
        order = torch.randperm(len(features), generator=self._generator())[:size]
        return features[order], torch.tensor(self.owners)[order]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def figures_of(
    preset: Preset, sides: Sequence[Side], streams: Sequence[Iterator[Tensor]], seed: int
) -> dict[str, dict[str, Any] | str]:
    """Figures by name; where one cannot be had, the reason.

    Args:
        preset: inception or dino_v2.
        sides: of the reference, of the judged.
        streams: of the features of both; they are used up.
        seed: of subsets and bootstrap.
    """
    compute = _inception_figures if preset.name == "inception" else _neighbour_figures
    found = compute(sides, streams, seed)
    n = {"prompts": sides[1].prompts, "pictures": sides[1].pictures, "reference_pictures": sides[0].pictures}
    return {
        name: value
        if isinstance(value, str)
        else {"low": None, "high": None, **value, "preset": preset.protocol} | {"n": n | value.get("n", {})}
        for name, value in found.items()
    }


def _inception_figures(sides: Sequence[Side], streams: Sequence[Iterator[Tensor]], seed: int) -> dict[str, Any]:
    """FID and KID. Their intervals resample the judged prompts; the reference is held fixed."""
    fid = _or_reason(lambda: {"value": frechet_distance(*streams)})

    def kid() -> dict[str, Any]:
        kept = [side.sample(LARGEST)[0] for side in sides if side.features]
        if len(kept) < len(sides):
            raise UnavailableError("one side has no usable picture")
        value, spread = kernel_distance(*kept, seed)
        compared = min(map(len, kept))
        n = {"compared": compared, "subset": min(KID_SUBSET_SIZE, compared)}
        return {"value": value, "subset_std": spread, "n": n}

    # FID is of all pictures: an interval of those that were kept would be too wide.
    if all(side.pictures <= LARGEST for side in sides):
        fid = _with_interval(fid, frechet_influence, sides, seed, least=0.0)
    return {"fid": fid, "kid": _with_interval(_or_reason(kid), kernel_influence, sides, seed)}


def _with_interval(
    figure: dict[str, Any] | str,
    influence: Callable[[Tensor, Tensor], Tensor],
    sides: Sequence[Side],
    seed: int,
    least: float = -math.inf,
) -> dict[str, Any] | str:
    """The figure with the ends of its interval, which it has if that can be computed, and not below `least`."""
    if isinstance(figure, str):
        return figure
    (real, _), (fake, owners) = (side.sample(LARGEST) for side in sides)
    try:
        marks = figure["value"] + influence(real, fake)
    except RuntimeError as error:  # of torch's decompositions
        log.warning("no interval: %s", error)
        return figure
    found = ratio_interval(marks, owners, seed)
    low = None if found["low"] is None else max(found["low"], least)
    return {**found, "low": low, **figure}


def _neighbour_figures(sides: Sequence[Side], streams: Sequence[Iterator[Tensor]], seed: int) -> dict[str, Any]:
    for stream in streams:
        for _ in stream:
            pass
    names = ("precision", "recall", "density", "coverage")

    def compute() -> dict[str, Any]:
        size = min(sum(map(len, side.features)) for side in sides)
        if not size:
            raise UnavailableError("one side has no usable picture")
        (real, real_owner), (fake, fake_owner) = (side.sample(size) for side in sides)
        found = prdc(real, fake)
        owners = (fake_owner, real_owner, fake_owner, real_owner)
        return {
            name: ratio_interval(marks, owner, seed) | {"n": {"compared": size}}
            for name, marks, owner in zip(names, found, owners, strict=True)
        }

    figures = _or_reason(compute)
    return dict.fromkeys(names, figures) if isinstance(figures, str) else figures


def _or_reason(compute: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    try:
        return compute()
    except MissingLibraryError:
        raise
    except UnavailableError as error:
        return str(error)
