"""How far one set of pictures lies from another, from their features: FID, KID, precision and recall.

Features are [n, d], one row a picture.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpdmd_pipeline.metrics.weights import MissingLibraryError, UnavailableError

# Protocols as published; they name the presets.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # arXiv:1801.01401, and torchmetrics
NEIGHBOURS = 5  # arXiv:2002.09797
LARGEST = 10_000  # pictures a side whose features are kept, for KID and for precision and recall
_ROWS = 1024  # of a matrix of distances that are held at once


class Features(nn.Identity):
    """What torchmetrics takes for its network when the features are already there."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Iterable[Tensor], fake: Iterable[Tensor]) -> float:
    """FID of two streams of features [n, d], by torchmetrics; only their moments are held.

    Both streams are read to their end.

    Raises:
        UnavailableError: with no more pictures than features, when the covariance is singular and FID means nothing.
    """
    kind, metric = _torchmetrics("image.fid", "FrechetInceptionDistance"), None
    counts = {True: 0, False: 0}
    for stream, is_real in ((real, True), (fake, False)):
        for features in stream:
            metric = metric or kind(feature=Features(features.shape[1]))
            metric.update(features.double(), real=is_real)
            counts[is_real] += len(features)
    num_features = metric.inception.num_features if metric else 0
    if min(counts.values()) <= num_features:
        raise UnavailableError(
            f"FID needs more pictures than features on both sides (over {num_features}, better 10,000): "
            f"there are {counts[False]} against {counts[True]}"
        )
    return metric.compute().item()


def frechet_influence(real: Tensor, fake: Tensor) -> Tensor:
    """How much each of the fake pictures moves FID, to first order: its influence function at the two samples.

    A picture whose features lie c from the fake mean adds 2 (fake mean - real mean) . c + c' (I - T) c, less the mean
    of that over all. T carries the fake Gaussian onto the real one: I - T is the derivative of FID by the fake
    covariance.

    Args:
        real, fake: [n, d], [m, d].

    Returns:
        [m], of mean 0.

    Raises:
        RuntimeError: of torch, where a covariance has no decomposition.
    """
    real, fake = real.double(), fake.double()
    centred = fake - fake.mean(0)
    root = _root(real.T.cov(correction=1))
    carried = root @ _root(root @ fake.T.cov(correction=1) @ root, inverse=True) @ root
    linear = 2 * centred @ (fake.mean(0) - real.mean(0))
    moved = linear + (centred * (centred - centred @ carried)).sum(1)
    return moved - moved.mean()


def _root(covariance: Tensor, inverse: bool = False) -> Tensor:
    """Square root of a covariance [d, d], or the inverse of that in the directions that it has."""
    values, directions = torch.linalg.eigh(covariance)
    there = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.where(there, torch.zeros_like(values)).sqrt()
    if inverse:
        roots = torch.where(there, 1 / roots, 0.0)
    return directions * roots @ directions.T


def kernel_influence(real: Tensor, fake: Tensor) -> Tensor:
    """How much each of the fake pictures moves KID, to first order.

    A picture adds twice the difference of its mean kernel with the other fake pictures and with the real ones, less
    the mean of that over all. The kernel is (x . y / d + 1)^3.

    Args:
        real, fake: [n, d], [m, d].

    Returns:
        [m], of mean 0.
    """
    real, fake = real.double(), fake.double()
    near, far = [], []
    for rows in fake.split(_ROWS):
        own = _kernel(rows, rows).diagonal()
        near.append((_kernel(rows, fake).sum(1) - own) / (len(fake) - 1))
        far.append(_kernel(rows, real).mean(1))
    moved = 2 * (torch.cat(near) - torch.cat(far))
    return moved - moved.mean()


def _kernel(one: Tensor, two: Tensor) -> Tensor:
    return (one @ two.T / one.shape[1] + 1) ** 3


def kernel_distance(real: Tensor, fake: Tensor, seed: int) -> tuple[float, float]:
    """KID by torchmetrics: mean and standard deviation over subsets, of all pictures where there are fewer than 1000.

    Args:
        real, fake: [n, d], [m, d].
        seed: of the subsets.
    """
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    if size < 2:
        raise UnavailableError(
            f"KID needs at least 2 pictures on both sides: there are {len(fake)} against {len(real)}"
        )
    kind = _torchmetrics("image.kid", "KernelInceptionDistance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it holds all features: they are LARGEST at most
        metric = kind(feature=Features(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return mean.item(), spread.item()


def _torchmetrics(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(f"torchmetrics.{module}"), name)
    except ImportError as error:
        raise MissingLibraryError("torchmetrics is not installed: pip install 'dpdmd-pipeline[metrics]'") from error


class Prdc(NamedTuple):
    """Precision, recall, density, coverage, each as one number a picture whose mean is the metric."""

    precision: Tensor  # [m], of the fake pictures
    recall: Tensor  # [n], of the real ones
    density: Tensor  # [m]
    coverage: Tensor  # [n]


def prdc(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> Prdc:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    A ball around each picture reaches to its k-th nearest other picture of the own set.

    Args:
        real, fake: [n, d], [m, d]; compare at equal n and m only.
        neighbours: k.

    Raises:
        UnavailableError: with no more than k pictures on a side.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise UnavailableError(
            f"precision and recall need over {neighbours} pictures on both sides: "
            f"there are {len(fake)} against {len(real)}"
        )
    real, fake = real.double(), fake.double()
    real_radius, fake_radius = _radius(real, neighbours), _radius(fake, neighbours)
    inside, covered, recalled = [], [], []
    for start in range(0, len(real), _ROWS):
        rows = slice(start, start + _ROWS)
        distance = torch.cdist(real[rows], fake)
        within = distance < real_radius[rows, None]
        inside.append(within.sum(0))
        covered.append(within.any(1))
        recalled.append((distance < fake_radius[None, :]).any(1))
    balls = torch.stack(inside).sum(0).double()
    recall, coverage = torch.cat(recalled).double(), torch.cat(covered).double()
    return Prdc((balls > 0).double(), recall, balls / neighbours, coverage)


def _radius(points: Tensor, neighbours: int) -> Tensor:
    """Distance to the k-th nearest other point, [n]; the nearest of all is the point itself."""
    chunks = (torch.cdist(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(_ROWS))
    return torch.cat(list(chunks))
