"""Levels of a teacher start: their spacing, their ends, and what is refused."""

import pytest
import torch
from comfy_nodes.schedules import Levels, sigmas_of_timesteps
from comfy_nodes.starts import join_levels
from tests.raising import refuses

FLOW = Levels("flow", None, published=True)
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
CUMULATED = (1 - BETAS).cumprod(0)
TABLE = ((1 - CUMULATED) / CUMULATED).sqrt().float()
EPS = Levels("eps", TABLE, published=True)
SHIFTED = torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0])
TRAILING = sigmas_of_timesteps([999, 749, 499, 249], TABLE)


@pytest.mark.parametrize("landing", [1, 2, 3])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_the_teacher_of_a_flow_model_takes_equal_steps_of_sigma_to_the_landing_level(landing, steps):
    joined = join_levels(SHIFTED, landing, steps, FLOW)
    assert torch.equal(joined[steps:], SHIFTED[landing:])
    torch.testing.assert_close(joined[: steps + 1], torch.linspace(1, SHIFTED[landing], steps + 1))


@pytest.mark.parametrize(
    ("landing", "steps", "timesteps"),
    [(1, 1, [999]), (1, 2, [999, 874]), (1, 3, [999, 916, 832]), (2, 4, [999, 874, 749, 624])],
)
def test_the_teacher_of_a_diffusion_model_steps_on_whole_timesteps(landing, steps, timesteps):
    joined = join_levels(TRAILING, landing, steps, EPS)
    assert torch.equal(joined[:steps], TABLE[timesteps])
    assert torch.equal(joined[steps:], TRAILING[landing:])


def test_one_teacher_step_to_the_first_landing_level_takes_the_students_own_levels():
    assert torch.equal(join_levels(SHIFTED, 1, 1, FLOW), SHIFTED)


@pytest.mark.parametrize(
    ("levels", "landing", "steps", "facts"),
    [
        (SHIFTED, 0, 3, ("landing", "0", "1 to 3")),
        (SHIFTED, 4, 3, ("landing", "4", "1 to 3")),
        (SHIFTED, 1.5, 3, ("landing", "1.5")),
        (SHIFTED, 1, 0, ("teacher_steps", "0")),
        (SHIFTED[[0, -1]], 1, 3, ("1, 0", "one step")),
    ],
)
def test_a_start_that_leaves_a_model_no_step_is_refused(levels, landing, steps, facts):
    with refuses(ValueError, *facts):
        join_levels(levels, landing, steps, FLOW)


def test_more_teacher_steps_than_timesteps_are_refused():
    with refuses(ValueError, "teacher_steps", "251"):
        join_levels(TRAILING, 1, 251, EPS)
    assert len(join_levels(TRAILING, 1, 250, EPS)) == 254
