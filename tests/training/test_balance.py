"""The weight that keeps two gradients in proportion, in closed form; test_distill.py has it in the loop."""

import math

import pytest
import torch
from tests.training.conftest import RECIPE

from dpdmd_pipeline.training.balance import Balance
from dpdmd_pipeline.training.recipe import Recipe


def balance(**changes) -> Balance:
    asked = {"weighting": "balanced", "diversity_weight": 0.5, "balance_ema": 0.75, **changes}
    return Balance(Recipe(**{**RECIPE, **asked}), torch.device("cpu"))


def test_the_first_measurement_alone_decides_the_first_weight():
    found = balance()
    found.measure(torch.tensor(3.0), torch.tensor(12.0))
    assert found.weight.item() == pytest.approx(0.5 * 12 / 3)


def test_later_measurements_are_averaged_in_logarithms():
    found, ratios = balance(), [4.0, 1.0, 0.5]
    for ratio in ratios:
        found.measure(torch.tensor(2.0), torch.tensor(2 * ratio))
    expected = 0.75 * (0.75 * math.log(4.0) + 0.25 * math.log(1.0)) + 0.25 * math.log(0.5)
    assert found.weight.item() == pytest.approx(0.5 * math.exp(expected))


def test_turns_that_measure_are_the_recipes():
    assert [step for step in range(12) if balance(balance_every=5).due(step)] == [0, 5, 10]


def test_a_state_comes_back_bit_for_bit():
    before, after = balance(), balance()
    after.load_state_dict(before.state_dict())
    for ratio in (0.3, 1.7):
        before.measure(torch.tensor(1.0), torch.tensor(ratio))
    after.load_state_dict(before.state_dict())
    assert torch.equal(after.weight, before.weight)
    for one in (before, after):
        one.measure(torch.tensor(0.7), torch.tensor(0.2))
    assert torch.equal(after.weight, before.weight)
