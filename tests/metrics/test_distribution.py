import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from dpdmd_pipeline.metrics.distribution import (
    count_repeats,
    frechet_distance,
    frechet_influence,
    kernel_distance,
    kernel_influence,
    prdc,
)
from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.summary import ratio_interval


@pytest.fixture(scope="module")
def clouds():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(120, 6, generator=generator), torch.randn(90, 6, generator=generator) * 1.4 + 0.5


def test_fid_is_the_distance_of_two_gaussians(clouds):
    real, fake = (cloud.double().numpy() for cloud in clouds)
    covariances = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    shift = np.square(real.mean(0) - fake.mean(0)).sum()
    expected = shift + np.trace(sum(covariances) - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    distance = frechet_distance(clouds[0].split(50), clouds[1].split(7))
    assert math.isclose(distance, expected, rel_tol=1e-6)


def test_fid_of_too_few_pictures_is_refused(clouds):
    with pytest.raises(UnavailableError, match=r"FID .*\b6\b.*\b6\b.*\b120\b"):
        frechet_distance([clouds[0]], [clouds[1][:6]])


def test_fid_of_a_set_with_itself_is_never_negative():
    for seed in range(8):
        features = torch.randn(40, 12, generator=torch.Generator().manual_seed(seed)) * 30
        assert 0 <= frechet_distance([features], [features]) < 1e-3


def test_kid_is_the_unbiased_estimate_for_few_pictures(clouds):
    real, fake = clouds[0][:90].double(), clouds[1].double()

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    within = sum((kernel(x, x).sum() - kernel(x, x).trace()) / (90 * 89) for x in (real, fake))
    expected = within - 2 * kernel(real, fake).mean()
    distance, spread = kernel_distance(real, fake, seed=0)
    assert math.isclose(distance, expected.item(), rel_tol=1e-9) and spread < 1e-9
    state = torch.get_rng_state()
    kernel_distance(real, fake, seed=0)
    assert torch.equal(torch.get_rng_state(), state)


def weighted_fid(real, fake, weights):
    """FID with a mean and covariance over weighted pictures."""
    mean = weights @ fake
    covariance = (fake - mean).T @ ((fake - mean) * weights[:, None])
    other = np.cov(real, rowvar=False)
    return np.square(real.mean(0) - mean).sum() + np.trace(covariance + other - 2 * sqrtm(other @ covariance).real)


def test_the_influence_on_fid_is_its_derivative_by_a_picture_s_weight(clouds):
    real, fake = (cloud.double().numpy() for cloud in clouds)
    influence, count = frechet_influence(*clouds), len(fake)
    step, even = 1e-5, np.full(count, 1 / count)
    for index in (0, 17, 89):
        more, less = ((1 - sign * step) * even + sign * step * np.eye(count)[index] for sign in (1, -1))
        slope = (weighted_fid(real, fake, more) - weighted_fid(real, fake, less)) / (2 * step)
        assert math.isclose(influence[index].item(), slope, rel_tol=0.03, abs_tol=0.02)  # covariances over n - 1 and n
    assert abs(influence.mean().item()) < 1e-9


def test_the_influence_on_kid_is_that_of_leaving_a_picture_out(clouds):
    real = clouds[0].double()
    fake = torch.randn(400, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.4 + 0.5

    def kernel(x, y):
        return (x @ y.T / 6 + 1) ** 3

    def kid(some):
        n, own = len(some), kernel(some, some)
        return (own.sum() - own.trace()) / (n * (n - 1)) - 2 * kernel(some, real).mean()

    count = len(fake)
    left_out = torch.stack([kid(torch.cat([fake[:index], fake[index + 1 :]])) for index in range(count)])
    influence = kernel_influence(real, fake)
    torch.testing.assert_close((count - 1) * (left_out.mean() - left_out), influence, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("width", [3, 24])  # number of features; 24 features have 20 pictures each
@pytest.mark.parametrize("influence", [frechet_influence, kernel_influence])
def test_the_intervals_of_fid_and_kid_are_as_wide_as_other_prompts_make_them(influence, width):
    """Pictures of one prompt are similar: an interval over pictures would be a third as wide."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(800, width, generator=generator, dtype=torch.float64)
    prompts, pictures = 40, 12
    owners = torch.arange(prompts).repeat_interleave(pictures)
    values, widths = [], []
    for seed in range(120):
        centres = torch.randn(prompts, 1, width, generator=generator, dtype=torch.float64)
        noise = torch.randn(prompts, pictures, width, generator=generator, dtype=torch.float64)
        fake = (1.0 + 0.8 * centres + 0.6 * noise).flatten(0, 1)
        if influence is frechet_influence:
            values.append(frechet_distance([real], [fake]))
        else:
            own = (fake @ fake.T / width + 1) ** 3
            far = (fake @ real.T / width + 1) ** 3
            values.append((own.mean() - 2 * far.mean()).item())
        interval = ratio_interval(influence(real, fake), owners, seed)
        widths.append(interval["high"] - interval["low"])
    spread = torch.tensor(values).std().item()
    assert math.isclose(np.mean(widths) / (2 * 1.96), spread, rel_tol=0.2)


def test_precision_recall_density_and_coverage_match_their_papers(clouds):
    real, fake, k = clouds[0][:40].double(), clouds[1][:30].double(), 3

    def radius(points, index):
        others = [(points[index] - other).norm() for j, other in enumerate(points) if j != index]
        return sorted(others)[k - 1]

    real_radius = [radius(real, i) for i in range(len(real))]
    fake_radius = [radius(fake, j) for j in range(len(fake))]
    distance = torch.tensor([[(r - f).norm() for f in fake] for r in real])
    balls = torch.tensor([[sum(distance[i, j] < real_radius[i] for i in range(40))] for j in range(30)])[:, 0]
    result = prdc(real, fake, k)
    assert result.precision.tolist() == (balls > 0).tolist()
    assert result.density.tolist() == [count / k for count in balls.tolist()]
    assert result.recall.tolist() == [any(distance[i, j] < fake_radius[j] for j in range(30)) for i in range(40)]
    assert result.coverage.tolist() == [distance[i].min() < real_radius[i] for i in range(40)]


def test_the_chunk_size_of_the_distances_does_not_matter(monkeypatch):
    torch.manual_seed(0)
    real, fake = torch.randn(50, 4), torch.randn(50, 4)
    whole = prdc(real, fake)
    monkeypatch.setattr("dpdmd_pipeline.metrics.distribution._ROWS", 7)
    for values, expected in zip(prdc(real, fake), whole, strict=True):
        assert torch.equal(values, expected)


def test_points_with_k_copies_are_counted():
    points = torch.arange(8.0)[:, None].expand(8, 3)
    assert count_repeats(torch.cat([points, points[:1], points[:1], points[1:2]]), 2) == 3
    assert count_repeats(points) == 0


def test_neighbours_need_more_pictures_than_their_number():
    with pytest.raises(UnavailableError, match=r"\b5\b.*\b5\b.*\b9\b"):
        prdc(torch.randn(9, 2), torch.randn(5, 2))
