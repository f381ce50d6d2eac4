import math

import pytest
import torch

from dpdmd_pipeline.metrics.shapes import count_modes, coverage, effective_modes, entropy
from dpdmd_pipeline.metrics.summary import gap_recovered, interval


def counts_of(probabilities: torch.Tensor, n: int, repeats: int) -> torch.Tensor:
    torch.manual_seed(0)
    drawn = torch.multinomial(probabilities.expand(repeats, -1), n, replacement=True)
    return torch.stack([count_modes(row, probabilities.shape[-1]) for row in drawn])


@pytest.mark.parametrize("n", [32, 64, 1000])
def test_effective_modes_estimates_inverse_simpson_at_any_sample_size(n):
    probabilities = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.1, 0.1])
    truth = 1 / probabilities.square().sum()
    counts = counts_of(probabilities, n, 400)
    agreement = 1 / effective_modes(counts)  # the agreement is unbiased, not its inverse
    torch.testing.assert_close(agreement.mean().float(), 1 / truth, rtol=0.03, atol=0)


def test_effective_modes_of_a_single_mode_is_one_and_of_too_few_pictures_zero():
    assert effective_modes(torch.tensor([[5.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).tolist() == [1, 0, 0]


def test_entropy_is_corrected_for_the_sample_size():
    counts = counts_of(torch.full((16,), 1 / 16), 64, 400)
    assert abs(entropy(counts).mean() - 4) < 0.02
    share = counts / 64
    plain = -(share * share.clamp(min=1e-12).log2()).sum(1).mean()
    assert plain < 3.85


def test_entropy_without_samples_is_zero():
    assert entropy(torch.zeros(1, 4)).item() == 0


def test_coverage_of_a_uniform_sampler_is_the_expected_one():
    counts = counts_of(torch.full((72,), 1 / 72), 64, 400)
    assert abs(coverage(counts).mean() - (1 - (1 - 1 / 72) ** 64)) < 0.005


def test_the_interval_has_the_width_of_a_normal_mean():
    torch.manual_seed(0)
    values = torch.randn(200)
    figure = interval(values, seed=0)
    half = 1.96 * values.std().item() / 200**0.5
    assert figure["low"] < figure["value"] < figure["high"]
    assert math.isclose(figure["high"] - figure["low"], 2 * half, rel_tol=0.1)
    assert figure == interval(values, seed=0)


def test_gap_recovered_is_a_share_and_none_if_nothing_was_lost():
    assert gap_recovered(10, 2, 2) == 0 and gap_recovered(10, 2, 10) == 1 and gap_recovered(10, 2, 8) == 0.75
    assert gap_recovered(5, 6, 7) is None
