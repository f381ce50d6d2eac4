"""The measures of one prompt: its text and pictures in, its numbers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.diversity import nearest_similarity, one_minus_cosine, vendi_score
from dpdmd_pipeline.metrics.embedders import Embedder
from dpdmd_pipeline.metrics.errors import UnfitError

if TYPE_CHECKING:
    from PIL.Image import Image

_BLOCK = 1 << 16  # pixels of each picture in double precision at once
# Reasons why a picture has no number. "network" in a reason makes the fault carry the metric's name.
NO_NUMBER = "the network gave no finite number"
NO_ANSWER = "the network's answer did not parse"


class Measured(NamedTuple):
    """Numbers of one prompt."""

    values: dict[str, float]  # empty if the prompt could not be measured
    nearest: Tensor | None = None  # [n] cosine of each picture with its nearest other one
    features: Tensor | None = None  # [n, d]
    unusable: tuple[int, ...] = ()  # indices of pictures without a number
    why: str = NO_NUMBER
    cut_at: int | None = None  # number of tokens that the network read of a longer prompt


class Measure(Protocol):
    """One metric, or several from the same pass."""

    least: int = 1  # pictures per prompt, at least
    any_size: bool = False  # True if pictures of one prompt may differ in size

    def __call__(self, text: str, images: Sequence[Image]) -> Measured: ...


@dataclass
class SetDiversity(Measure):
    """1 - mean cosine, Vendi score and nearest similarities in the space of one embedder."""

    embed: Embedder
    least = 2

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        features, unusable = _usable(self.embed(images))
        if len(features) < self.least:
            return Measured({}, unusable=unusable)
        values = {"one_minus_cosine": one_minus_cosine(features), "vendi": vendi_score(features)}
        return Measured(values, nearest_similarity(features), unusable=unusable)


@dataclass
class PairDiversity(Measure):
    """Mean of the n (n - 1) / 2 `distances` between n pictures, in the order (1, 0), (2, 0), (2, 1), ..."""

    distances: Callable[[Sequence[Image]], Tensor]
    least = 2

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        rows, columns = torch.tril_indices(len(images), len(images), offset=-1)
        distances = self.distances(images).double()
        finite = torch.eye(len(images), dtype=torch.bool)
        finite[rows, columns] = finite[columns, rows] = distances.isfinite()
        # First drop pictures without a finite pair, so that they do not spoil the others' pairs.
        good = finite.sum(1) > 1
        good &= (finite | ~good).all(1)
        usable = distances[good[rows] & good[columns]]
        values = {"mean_distance": usable.mean().item()} if len(usable) else {}
        return Measured(values, unusable=_false_indices(good))


class PictureScores(Measure):
    """Mean over a prompt's pictures of one score each.

    Args:
        score: function from a text and n pictures to [n]. Its method `cut_at`, if any, maps a text to the number of
            tokens that it reads if the text has more, else to None.
        why: reason to report for a picture without a number.
    """

    def __init__(self, score: Callable[[str, Sequence[Image]], Tensor], why: str = NO_NUMBER) -> None:
        self.score, self.cut_at, self.why = score, getattr(score, "cut_at", lambda text: None), why

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        scores = self.score(text, images).double()
        finite = scores.isfinite()
        values = {"score": scores[finite].mean().item()} if finite.any() else {}
        return Measured(values, unusable=_false_indices(finite), why=self.why, cut_at=self.cut_at(text))


@dataclass
class PartScores(Measure):
    """Answers about the parts of a prompt: mean, geometric mean, and share of pictures with all parts right."""

    score: Callable[[str, Sequence[Image]], Tensor]

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        right, unusable = _usable(self.score(text, images))
        if not len(right):
            return Measured({}, unusable=unusable)
        right = right.double()
        values = {
            "mean": right.mean().item(),
            "geometric_mean": right.clamp(min=1e-12).log().mean(1).exp().mean().item(),
            "all_right": (right > 0.5).all(1).double().mean().item(),
        }
        return Measured(values, unusable=unusable)


@dataclass
class SetFeatures(Measure):
    """The features themselves, to compare two distributions."""

    embed: Embedder
    any_size = True  # FID is measured on real pictures

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        features, unusable = _usable(self.embed(images))
        return Measured({}, features=features, unusable=unusable)


@dataclass
class ShapesReader(Measure):
    """The exact reader of the embedded world, for pictures of its size and prompts of its words."""

    names: tuple[str, ...]
    least: int

    def __call__(self, text: str, images: Sequence[Image]) -> Measured:
        from torchvision.transforms.functional import to_tensor

        from dpdmd_pipeline.metrics.shapes import judge_prompt

        try:
            numbers = judge_prompt(torch.stack([to_tensor(image) for image in images]), text)
        except ValueError as error:
            raise UnfitError(f"the exact reader: {error}") from error
        return Measured({name: numbers[name].item() for name in self.names})


def pixel_distances(images: Sequence[Image]) -> Tensor:
    """RMS differences of all pairs (1, 0), (2, 0), (2, 1), ..., in [0, 1].

    The sums are of whole numbers below 2^53, so they are exact in float64 in any order.
    """
    from torchvision.transforms.functional import pil_to_tensor

    flat = torch.stack([pil_to_tensor(image).flatten() for image in images])  # uint8: sixty large pictures must fit
    products = torch.zeros(len(flat), len(flat), dtype=torch.float64)
    for block in flat.split(_BLOCK, dim=1):
        values = block.double()
        products += values @ values.T
    norms = products.diagonal()
    squared = norms[:, None] + norms[None, :] - 2 * products
    rows, columns = torch.tril_indices(len(flat), len(flat), offset=-1)
    return (squared[rows, columns] / flat.shape[1]).sqrt() / 255


def _usable(features: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Rows that are finite and not all zero, and the indices of the others."""
    good = features.isfinite().all(1) & features.ne(0).any(1)
    return features[good], _false_indices(good)


def _false_indices(good: Tensor) -> tuple[int, ...]:
    return tuple((~good).nonzero().flatten().tolist())
