"""Distances between two sets of pictures, from their features: FID, KID, precision and recall.

Features are [n, d], one row per picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.libraries import from_torchmetrics

# As published.
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # arXiv:1801.01401, and torchmetrics
NEIGHBOURS = 5  # arXiv:2002.09797
LARGEST = 10_000  # pictures per side whose features are stored, for KID and for precision and recall
_ROWS = 1024  # rows of a distance matrix in memory at once


class _Features(nn.Identity):
    """Stand-in for torchmetrics' network where the features exist already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def frechet_distance(real: Iterable[Tensor], fake: Iterable[Tensor]) -> float:
    """FID of two streams of features [n, d], by torchmetrics; reads both to their end, and stores only their moments.

    Rounding would make it slightly negative for equal sets: it is at least 0.

    Raises:
        UnavailableError: with no more pictures than features, where the covariance is singular and FID means nothing.
    """
    metric_class, metric = from_torchmetrics("image.fid", "FrechetInceptionDistance"), None
    counts = {True: 0, False: 0}
    for stream, is_real in ((real, True), (fake, False)):
        for features in stream:
            metric = metric or metric_class(feature=_Features(features.shape[1]))
            metric.update(features.double(), real=is_real)
            counts[is_real] += len(features)
    num_features = metric.inception.num_features if metric else 0
    if min(counts.values()) <= num_features:
        raise UnavailableError(
            f"FID needs more pictures than features on both sides (over {num_features}, better 10,000), "
            f"not {counts[False]} against {counts[True]}"
        )
    return metric.compute().clamp(min=0).item()


def frechet_influence(real: Tensor, fake: Tensor) -> Tensor:
    """First-order effect of each fake picture on FID, [m] of mean 0: its influence function at the two samples.

    A picture whose features differ from the fake mean by c adds 2 (fake mean - real mean) . c + c' (I - T) c, minus
    the mean of this term over all pictures. T transports the fake Gaussian onto the real one: I - T is the derivative
    of FID by the fake covariance.

    Raises:
        RuntimeError: from torch, if a covariance has no decomposition.
    """
    real, fake = real.double(), fake.double()
    centred = fake - fake.mean(0)
    root = _root(real.T.cov(correction=1))
    carried = root @ _root(root @ fake.T.cov(correction=1) @ root, inverse=True) @ root
    linear = 2 * centred @ (fake.mean(0) - real.mean(0))
    moved = linear + (centred * (centred - centred @ carried)).sum(1)
    return moved - moved.mean()


def _root(covariance: Tensor, inverse: bool = False) -> Tensor:
    """Square root of a covariance [d, d], or its pseudo-inverse."""
    values, directions = torch.linalg.eigh(covariance)
    nonzero = values > values[-1] * len(values) * torch.finfo(values.dtype).eps
    roots = values.where(nonzero, torch.zeros_like(values)).sqrt()
    if inverse:
        roots = torch.where(nonzero, 1 / roots, 0.0)
    return directions * roots @ directions.T


def kernel_influence(real: Tensor, fake: Tensor) -> Tensor:
    """First-order effect of each fake picture on KID, [m] of mean 0.

    A picture adds twice the difference between its mean kernel with the other fake pictures and with the real ones,
    minus the mean of this term over all pictures. The kernel is (x . y / d + 1)^3.
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
    """KID by torchmetrics: mean and standard deviation over subsets of 1000 pictures, or of all if there are fewer."""
    size = min(KID_SUBSET_SIZE, len(real), len(fake))
    if size < 2:
        raise UnavailableError(f"KID needs at least 2 pictures on both sides, not {len(fake)} against {len(real)}")
    metric_class = from_torchmetrics("image.kid", "KernelInceptionDistance")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about storing all features: at most LARGEST here
        metric = metric_class(feature=_Features(real.shape[1]), subsets=KID_SUBSETS, subset_size=size)
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    return mean.item(), spread.item()


class Prdc(NamedTuple):
    """Precision, recall, density, coverage, as one number per picture; their mean is the metric."""

    precision: Tensor  # [m], fake pictures
    recall: Tensor  # [n], real pictures
    density: Tensor  # [m]
    coverage: Tensor  # [n]


def prdc(real: Tensor, fake: Tensor, neighbours: int = NEIGHBOURS) -> Prdc:
    """Precision and recall (arXiv:1904.06991), density and coverage (arXiv:2002.09797).

    The ball around a picture reaches to the k-th nearest other picture of its own set, with k `neighbours`. Compare
    results at equal numbers of pictures only.

    Raises:
        UnavailableError: with k pictures or fewer on a side.
    """
    if min(len(real), len(fake)) <= neighbours:
        raise UnavailableError(
            f"precision and recall need over {neighbours} pictures on both sides, not {len(fake)} against {len(real)}"
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


def count_repeats(points: Tensor, neighbours: int = NEIGHBOURS) -> int:
    """Number of points [n, d] with k or more exact copies: their balls have a radius of 0 and hold nothing."""
    counts = torch.unique(points, dim=0, return_counts=True)[1]
    return int(counts[counts > neighbours].sum())


def _radius(points: Tensor, neighbours: int) -> Tensor:
    """Distance to the k-th nearest other point, [n]."""
    # k + 1: the nearest of all is the point itself.
    chunks = (torch.cdist(rows, points).kthvalue(neighbours + 1, dim=1).values for rows in points.split(_ROWS))
    return torch.cat(list(chunks))
