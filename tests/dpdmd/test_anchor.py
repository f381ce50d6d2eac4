"""Anchors and targets, specified by the end of one sampling step."""

import pytest
import torch
from gaussian import PATHS, flow_levels, make_gaussian, sdxl_table, vp_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.raising import refuses

from dpdmd_pipeline.dpdmd.anchor import anchor_target, anchored_steps, check_falling, teacher_anchors
from dpdmd_pipeline.dpdmd.losses import diversity_loss
from dpdmd_pipeline.dpdmd.noise import flow_level, flow_schedule, flow_sigmas, step, vp_level, vp_schedule
from dpdmd_pipeline.dpdmd.sampling import rollout

SHAPE = (2, 3, 3)
SCHEDULES = {
    "flow shift 1": flow_schedule(flow_sigmas(30, 1.0, "diffusers")),
    "flow shift 3": flow_schedule(flow_sigmas(30, 3.0, "diffusers")),
    "vp": vp_schedule(50, sdxl_table()),
}
schedules = pytest.mark.parametrize("levels", SCHEDULES.values(), ids=SCHEDULES)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the secant target


@schedules
@pytest.mark.parametrize("anchor_steps", [1, 5, 10, 29])
def test_one_step_to_the_target_lands_on_the_anchor(levels, anchor_steps):
    start, end = levels[0], levels[anchor_steps]
    noise, anchor = randn(0, 2, *SHAPE).float(), randn(1, 2, *SHAPE).float()
    reached = step(noise, anchor_target(noise, anchor, start, end), start, end)
    torch.testing.assert_close(reached, anchor, rtol=1e-4, atol=1e-4)


def double(value):
    return torch.tensor(value, dtype=torch.float64)


flow_pairs = st.tuples(st.floats(0, 1), st.floats(0, 1)).filter(lambda pair: pair[1] - pair[0] > 1e-3)
vp_pairs = st.tuples(st.integers(0, 999), st.integers(0, 999)).filter(lambda pair: pair[0] < pair[1])
level_pairs = st.one_of(
    flow_pairs.map(lambda pair: [flow_level(double(sigma)) for sigma in pair]),
    vp_pairs.map(lambda pair: [vp_level(torch.tensor(timestep), sdxl_table()) for timestep in pair]),
)


@settings(max_examples=100, deadline=None)
@given(pair=level_pairs, seed=st.integers(0, 2**31))
def test_one_step_to_the_target_lands_on_the_anchor_between_any_two_levels(pair, seed):
    end, start = pair
    latents, anchor = randn(seed, 2, 1, *SHAPE)
    reached = step(latents, anchor_target(latents, anchor, start, end), start, end)
    torch.testing.assert_close(reached, anchor, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sigma", [0.988, 0.963, 0.935, 0.851, 0.5])
def test_the_target_is_the_papers_velocity_at_sigma_1(sigma):
    start, end = flow_level(double(1.0)), flow_level(double(sigma))
    noise, anchor = randn(0, 2, *SHAPE), randn(1, 2, *SHAPE)
    velocity = (noise - anchor_target(noise, anchor, start, end)) / start.sigma
    torch.testing.assert_close(velocity, (noise - anchor) / (1 - sigma), rtol=1e-10, atol=1e-10)  # eq. 6


def test_the_target_is_that_of_progressive_distillation_for_vp():
    start, end = vp_levels(4)[0], vp_levels(4)[1]
    noise, anchor = randn(0, 2, *SHAPE), randn(1, 2, *SHAPE)
    # arXiv:2202.00512, appendix G: (z'' - sigma''/sigma z) / (alpha'' - sigma''/sigma alpha)
    ratio = end.sigma / start.sigma
    expected = (anchor - ratio * noise) / (end.alpha - ratio * start.alpha)
    torch.testing.assert_close(anchor_target(noise, anchor, start, end), expected)
    # the noise that the target implies is the chord of the path in (latents / alpha, sigma / alpha)
    implied = (noise - start.alpha * expected) / start.sigma
    rise = noise / start.alpha - anchor / end.alpha
    torch.testing.assert_close(implied, rise / (start.sigma / start.alpha - end.sigma / end.alpha))


@schedules
def test_the_target_at_the_clean_end_is_the_picture(levels):
    noise, picture = randn(0, 1, *SHAPE), randn(1, 1, *SHAPE)
    torch.testing.assert_close(anchor_target(noise, picture, levels[0], levels[-1]), picture)


@schedules
@pytest.mark.parametrize(("start", "end"), [(3, 3), (5, 2)])
def test_an_anchor_that_is_not_less_noisy_is_refused_with_both_numbers(levels, start, end):
    with refuses(ValueError, "anchor") as error:
        check_falling([levels[start], levels[end]])
    assert f"{levels[start].sigma:.3f}" in str(error.value)
    assert f"{levels[end].sigma:.3f}" in str(error.value)


# ---- the teacher's pass


@pytest.mark.parametrize("levels", [make(10) for make in PATHS.values()], ids=PATHS)
def test_one_pass_gives_the_anchors_of_separate_rollouts(levels):
    gaussian, noise, calls = make_gaussian(SHAPE), randn(0, 2, *SHAPE), []

    def teacher(latents, level):
        calls.append(level.timestep.item())
        return gaussian.denoise(latents, level)

    anchors = teacher_anchors(teacher, noise, levels, [1, 4, 9])
    assert calls == levels.timestep[:9].tolist()  # nothing beyond the last anchor
    for count, anchor in zip([1, 4, 9], anchors, strict=True):
        assert torch.equal(anchor, rollout(gaussian.denoise, noise, levels[: count + 1]))


@pytest.mark.parametrize("anchor_steps", [[], [0], [0, 3], [3, 3], [5, 2], [10], [2, 11]])
def test_step_counts_that_do_not_rise_inside_the_schedule_are_refused(anchor_steps):
    with refuses(ValueError, "10") as error:
        teacher_anchors(make_gaussian(SHAPE).denoise, randn(0, 1, *SHAPE), flow_levels(10), anchor_steps)
    assert str(anchor_steps) in str(error.value)


@pytest.mark.parametrize("path", PATHS)
def test_the_teacher_reaches_the_anchors_of_the_exact_ode(path):
    gaussian, noise, errors = make_gaussian(SHAPE), randn(0, 4, *SHAPE), []
    for num_steps in (100, 200, 400):
        levels = vp_levels(num_steps, total=3200) if path == "vp" else flow_levels(num_steps)
        counts = [num_steps // 4, num_steps // 2]
        anchors = teacher_anchors(gaussian.denoise, noise, levels, counts)
        exact = [gaussian.solve(noise, levels[0], levels[count]) for count in counts]
        errors.append(max((a - e).abs().max().item() for a, e in zip(anchors, exact, strict=True)))
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("path", PATHS)
def test_a_perfect_student_has_no_diversity_loss(path):
    gaussian, levels = make_gaussian(SHAPE), PATHS[path](4)
    noise = randn(0, 4, *SHAPE)
    anchors = [gaussian.solve(noise, levels[0], end) for end in levels[1:3]]
    for start, end in zip(anchored_steps(noise, anchors, levels[0], levels[1:3]), levels[1:3], strict=True):
        perfect = gaussian.one_step(start.latents, start.level, end)
        assert diversity_loss(perfect, start.target, start.level, "x0") < 1e-20
        imperfect = gaussian.denoise(start.latents, start.level)
        assert diversity_loss(imperfect, start.target, start.level, "x0") > 1e-4


# ---- chains


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_student_that_hits_every_target_passes_through_the_anchors(path, count):
    levels = PATHS[path](4)
    noise, ends = randn(0, 2, *SHAPE), levels[1 : count + 1]
    anchors = [randn(seed, 2, *SHAPE) for seed in range(1, count + 1)]
    latents = noise
    for anchored, anchor, start, end in zip(
        anchored_steps(noise, anchors, levels[0], ends), anchors, levels[:-1], ends, strict=False
    ):
        assert anchored.level.sigma == start.sigma
        torch.testing.assert_close(anchored.latents, latents)  # the noise, then the previous anchor
        latents = step(anchored.latents, anchored.target, anchored.level, end)
        torch.testing.assert_close(latents, anchor, rtol=1e-8, atol=1e-8)


def test_an_anchor_without_a_level_is_refused():
    noise, levels = randn(0, 1, *SHAPE), flow_levels(4)
    with refuses(ValueError, "shorter"):
        anchored_steps(noise, [noise, noise], levels[0], [levels[1]])
    with refuses(ValueError, "0.750", "0.500"):
        check_falling([levels[0], levels[2], levels[1]])
