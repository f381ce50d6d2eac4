import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from dpdmd_pipeline.metrics.correlation import (
    correlation_figure,
    pooled,
    rank_correlation,
    rank_correlations,
    ranks,
    within,
)

EXACT = "diversity.shapes.effective_modes"


def test_ranks_and_their_correlation_are_scipy_s_with_ties_and_without():
    generator = torch.Generator().manual_seed(0)
    for few in (3, 1000):  # with 3 values most are equal
        one, two = torch.randint(few, (2, 5, 20), generator=generator).double()
        correlations = rank_correlation(one, two)
        for row in range(5):
            assert torch.equal(ranks(one[row]), torch.from_numpy(rankdata(one[row])) - 1)
            assert math.isclose(correlations[row], spearmanr(one[row], two[row]).statistic, rel_tol=1e-9)


@pytest.mark.parametrize("two, value", [([[1, 3, 9], [2, 4, 99]], 1.0), ([[5, 2, 0], [4, 1, -9]], -1.0)])
def test_the_same_order_is_one_and_the_other_way_round_minus_one(two, value):
    figure = correlation_figure(torch.tensor([[1, 3, 5], [2, 4, 6]]), torch.tensor(two), pooled, seed=0)
    assert figure["value"] == pytest.approx(value) == pytest.approx(figure["low"]) == pytest.approx(figure["high"])


def test_the_interval_encloses_the_value_and_depends_on_the_seed_alone():
    one = torch.rand(3, 30, generator=torch.Generator().manual_seed(1))
    two = one + 0.3 * torch.rand(3, 30, generator=torch.Generator().manual_seed(2))
    figure = correlation_figure(one, two, pooled, seed=0)
    assert 0 < figure["low"] < figure["value"] < figure["high"] < 1
    assert correlation_figure(one, two, pooled, seed=0) == figure != correlation_figure(one, two, pooled, seed=1)


def test_a_difference_between_models_alone_is_no_correlation_within_them():
    """Prompts have the opposite order within each model, but the second model is above the first in both metrics."""
    one, two = torch.tensor([[1.0, 2, 3], [11, 12, 13]]), torch.tensor([[3.0, 2, 1], [13, 12, 11]])
    assert pooled(one, two) > 0.5 and within(one, two) == -1


def test_within_is_the_mean_of_the_models_that_rank_their_prompts():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.rand(2, 3, 12, generator=generator).double()
    each = [spearmanr(*rows).statistic for rows in zip(one, two, strict=True)]
    assert within(one, two).item() == pytest.approx(sum(each) / 3)
    two[0] = 1.0
    assert within(one, two).item() == pytest.approx(sum(each[1:]) / 2)
    assert correlation_figure(one, torch.ones(3, 12), within, seed=0)["value"] is None


def test_without_ranks_there_is_no_number():
    nothing = {"value": None, "low": None, "high": None}
    assert correlation_figure(torch.ones(2, 4), torch.rand(2, 4), pooled, seed=0) == nothing
    assert correlation_figure(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [2.0]]), pooled, seed=0)["low"] is None


def test_metrics_correlate_with_the_exact_reader_if_it_has_values():
    values = {str(prompt): float(prompt) for prompt in range(4)}
    table = {EXACT: values, "diversity.clip.vendi": values, "quality.any.score": values}
    partly = {**table, "diversity.clip.vendi": {"0": 1.0, "3": 2.0}}
    figures = rank_correlations([table, partly], seed=0)
    assert list(figures) == ["diversity.clip.vendi"]
    assert figures["diversity.clip.vendi"]["n"] == {"prompts": 2, "models": 2}
    assert figures["diversity.clip.vendi"]["within"]["value"] == pytest.approx(1.0)
    assert figures["diversity.clip.vendi"]["preset"] == f"Spearman's, with {EXACT}"
    assert rank_correlations([{"diversity.clip.vendi": values}] * 2, seed=0) == {}
