"""Levels, grids, steps and conversions; diffusers is the oracle."""

import numpy as np
import pytest
import torch
from gaussian import sdxl_table
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.raising import refuses

from dpdmd_pipeline.dpdmd.noise import (
    NoiseLevel,
    add_noise,
    flow_level,
    flow_schedule,
    flow_sigmas,
    flow_student_schedule,
    noise_share,
    random_flow_level,
    shift_sigma,
    step,
    vp_level,
    vp_schedule,
    vp_schedule_at,
    x0_from_eps,
    x0_from_v_prediction,
    x0_from_velocity,
)

STEPS = [1, 4, 30]
SHIFTS = [1.0, 3.0]
hypothesis_settings = settings(max_examples=60, deadline=None)


def flow_scheduler(shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def ddim_scheduler(prediction_type="epsilon"):
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )


def network(latents, timestep):
    """Any smooth function of its inputs stands for a network."""
    return torch.tanh(latents.roll(1, -1)) + 0.3 * latents + torch.cos(torch.as_tensor(timestep) / 300.0)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- grids


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_diffusers_grid_is_that_of_the_scheduler(num_steps, shift):
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(num_steps)
    levels = flow_schedule(flow_sigmas(num_steps, shift, "diffusers"))
    torch.testing.assert_close(levels.sigma, scheduler.sigmas, rtol=0, atol=1e-7)
    torch.testing.assert_close(levels.timestep[:-1], scheduler.timesteps, rtol=0, atol=1e-4)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_shifted_grid_is_the_scheduler_on_uniform_sigmas(num_steps, shift):
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps))
    levels = flow_schedule(flow_sigmas(num_steps, shift, "shifted"))
    torch.testing.assert_close(levels.sigma, scheduler.sigmas, rtol=0, atol=1.5e-7)
    torch.testing.assert_close(levels.timestep[:-1], scheduler.timesteps, rtol=0, atol=1.5e-4)


@pytest.mark.parametrize("num_steps", [2, 4, 30])
def test_a_dynamic_shift_is_the_exponential_and_a_terminal_level_stretches_the_schedule(num_steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.02)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps), mu=0.7)
    sigmas = flow_sigmas(num_steps, float(np.exp(0.7)), "shifted", terminal=0.02)
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=1e-5, atol=1e-6)
    assert sigmas[-2].item() == pytest.approx(0.02)


def test_one_step_has_nothing_to_stretch():
    assert flow_sigmas(1, 2.0, "shifted", terminal=0.02).tolist() == [1, 0]


def test_the_two_grids_at_shift_3_are_the_published_numbers():
    published = torch.tensor([1, 0.8577, 0.6022, 0.0089, 0])
    torch.testing.assert_close(flow_sigmas(4, 3.0, "diffusers"), published, rtol=0, atol=5e-5)
    torch.testing.assert_close(flow_sigmas(4, 3.0, "shifted"), torch.tensor([1, 0.9, 0.75, 0.5, 0]))


def test_shift_keeps_both_ends_and_the_order():
    sigma = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.equal(shift_sigma(sigma, 1.0), sigma)
    shifted = shift_sigma(sigma, 3.0)
    assert shifted[0] == 0 and shifted[-1] == 1 and bool((shifted.diff() > 0).all())
    assert bool((shifted[1:-1] > sigma[1:-1]).all())


@pytest.mark.parametrize("sigmas", [[1, 0.5, 0.5, 0], [1, 0.6, 0.7, 0], [1.2, 0.5, 0], [1, 0.5, 0.25], [0.0]])
def test_a_schedule_that_does_not_fall_from_1_to_0_is_refused_with_its_numbers(sigmas):
    with refuses(ValueError, "sigmas") as error:
        flow_schedule(sigmas)
    assert all(str(float(sigma)) in str(error.value) for sigma in sigmas)


def test_a_student_has_a_grid_by_its_name_or_sigmas_of_its_own_which_are_not_shifted():
    named, own = flow_student_schedule("shifted", 4, 3.0), flow_student_schedule([1.0, 0.9, 0.75, 0.5], 4, 3.0)
    torch.testing.assert_close(named.sigma, own.sigma)
    assert torch.equal(named.sigma, flow_sigmas(4, 3.0, "shifted")) and own.sigma.tolist()[-2:] == [0.5, 0.0]
    with refuses(ValueError, "2", "num_steps=4"):
        flow_student_schedule([1.0, 0.5], 4, 3.0)
    with refuses(ValueError, "trailing", "diffusers", "shifted"):
        flow_student_schedule("trailing", 4, 3.0)


def test_random_levels_are_the_range_shifted_and_one_per_sample():
    level = random_flow_level(torch.tensor([0.0, 0.5]), (0.02, 0.98), 3.0)
    assert level.sigma.shape == level.alpha.shape == level.timestep.shape == (2, 1, 1, 1)
    torch.testing.assert_close(level.sigma.flatten(), shift_sigma(torch.tensor([0.02, 0.5]), 3.0))
    torch.testing.assert_close(level.timestep, 1000 * level.sigma)


def test_four_steps_of_sdxl_are_999_749_499_249_and_end_clean():
    levels = vp_schedule(4, sdxl_table())
    assert levels.timestep.tolist() == [999, 749, 499, 249, 0]
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    torch.testing.assert_close(levels.alpha.square() + levels.sigma.square(), torch.ones(5))
    assert levels.sigma.dtype == torch.float32


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 8, 10, 20, 25, 28, 30, 40, 50, 100])
def test_vp_schedule_has_the_timesteps_of_the_trailing_scheduler(num_steps):
    scheduler = ddim_scheduler()
    scheduler.set_timesteps(num_steps)
    levels = vp_schedule(num_steps, scheduler.alphas_cumprod)
    assert levels.timestep[:-1].tolist() == scheduler.timesteps.tolist()


def test_timesteps_given_by_hand_make_the_schedule_that_has_them():
    by_hand, trailing = vp_schedule_at([999, 749, 499, 249], sdxl_table()), vp_schedule(4, sdxl_table())
    for part in ("alpha", "sigma", "timestep"):
        assert torch.equal(getattr(by_hand, part), getattr(trailing, part))


@pytest.mark.parametrize("timesteps", [[1000], [499, 499], [249, 499], [10.5], [-1]])
def test_timesteps_that_do_not_fall_within_the_table_are_refused_with_their_numbers(timesteps):
    with refuses(ValueError, str(timesteps), "999"):
        vp_schedule_at(timesteps, sdxl_table())


def test_vp_schedule_starts_at_full_noise_and_falls_for_every_number_of_steps():
    table = sdxl_table()
    for num_steps in range(1, 1001, 7):
        levels = vp_schedule(num_steps, table)
        assert len(levels) == num_steps + 1
        assert levels.timestep[0] == 999
        assert bool((levels.sigma.diff() < 0).all()), num_steps


def test_the_oracle_table_is_that_of_sdxl():
    torch.testing.assert_close(sdxl_table().float(), ddim_scheduler().alphas_cumprod, rtol=1e-5, atol=0)


# ---- steps


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", STEPS)
def test_step_is_euler_of_diffusers_along_the_whole_trajectory(num_steps, shift):
    scheduler = flow_scheduler(shift)
    scheduler.set_timesteps(num_steps)
    levels = flow_schedule(flow_sigmas(num_steps, shift, "diffusers"))
    ours = theirs = randn(0, 2, 4, 8, 8).float()
    for index, timestep in enumerate(scheduler.timesteps):
        velocity = network(ours, levels[index].timestep)
        ours = step(ours, x0_from_velocity(ours, velocity, levels[index]), levels[index], levels[index + 1])
        theirs = scheduler.step(network(theirs, timestep), timestep, theirs).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("prediction_type", "x0_from"), [("epsilon", x0_from_eps), ("v_prediction", x0_from_v_prediction)]
)
@pytest.mark.parametrize("num_steps", [1, 4, 25, 50])  # divisors of 1000: elsewhere diffusers' own steps do not join up
def test_step_is_ddim_of_diffusers_along_the_whole_trajectory(num_steps, prediction_type, x0_from):
    scheduler = ddim_scheduler(prediction_type)
    scheduler.set_timesteps(num_steps)
    levels = vp_schedule(num_steps, scheduler.alphas_cumprod)
    ours = theirs = randn(0, 2, 4, 8, 8)
    for index, timestep in enumerate(scheduler.timesteps):
        output = network(ours, levels[index].timestep)
        ours = step(ours, x0_from(ours, output, levels[index]), levels[index], levels[index + 1])
        theirs = scheduler.step(network(theirs, timestep), timestep, theirs, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "levels", [flow_schedule(flow_sigmas(4, 3.0, "shifted")), vp_schedule(4, sdxl_table())], ids=["flow", "vp"]
)
def test_steps_towards_one_picture_join_up_and_end_on_it(levels):
    latents, denoised = randn(1, 2, 3, 4, 4), randn(2, 2, 3, 4, 4)
    torch.testing.assert_close(step(latents, denoised, levels[0], levels[0]), latents)
    half_way = step(latents, denoised, levels[0], levels[1])
    in_two = step(half_way, denoised, levels[1], levels[3])
    torch.testing.assert_close(in_two, step(latents, denoised, levels[0], levels[3]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step(latents, denoised, levels[2], levels[-1]), denoised, rtol=1e-6, atol=1e-6)


def test_levels_per_sample_act_sample_by_sample():
    x0, noise = randn(1, 3, 2, 4, 4), randn(2, 3, 2, 4, 4)
    sigma = torch.tensor([0.9, 0.4, 0.1], dtype=torch.float64)
    together = add_noise(x0, noise, flow_level(sigma.view(-1, 1, 1, 1)))
    for index, level in enumerate(flow_level(sigma)):
        assert torch.equal(together[index], add_noise(x0[index], noise[index], level))


def test_a_schedule_is_a_sequence_of_its_levels():
    levels = flow_schedule([1, 0.5, 0.25, 0])
    assert len(levels) == len(list(levels)) == 4
    assert [level.sigma.item() for level in levels] == [1, 0.5, 0.25, 0]
    assert levels[1:3].timestep.tolist() == [500, 250]
    assert levels[-1].alpha == 1


# ---- conversions, inverted


flow_levels = st.floats(1e-3, 1).map(lambda sigma: flow_level(torch.tensor(sigma, dtype=torch.float64)))
vp_levels = st.integers(0, 999).map(lambda timestep: vp_level(torch.tensor(timestep), sdxl_table()))
pairs = st.integers(0, 2**31).map(lambda seed: randn(seed, 2, 1, 2, 3, 3).unbind())


@hypothesis_settings
@given(level=flow_levels, pair=pairs)
def test_velocity_gives_back_x0(level, pair):
    x0, noise = pair
    latents = add_noise(x0, noise, level)
    torch.testing.assert_close(x0_from_velocity(latents, noise - x0, level), x0, rtol=1e-10, atol=1e-10)


@hypothesis_settings
@given(level=vp_levels, pair=pairs)
def test_eps_gives_back_x0(level, pair):
    x0, noise = pair
    torch.testing.assert_close(x0_from_eps(add_noise(x0, noise, level), noise, level), x0, rtol=1e-10, atol=1e-10)


@hypothesis_settings
@given(level=vp_levels, pair=pairs)
def test_v_prediction_gives_back_x0(level, pair):
    x0, noise = pair
    v_prediction = level.alpha * noise - level.sigma * x0
    latents = add_noise(x0, noise, level)
    torch.testing.assert_close(x0_from_v_prediction(latents, v_prediction, level), x0, rtol=1e-10, atol=1e-10)


@hypothesis_settings
@given(level=st.one_of(flow_levels, vp_levels), following=st.one_of(flow_levels, vp_levels), pair=pairs)
def test_a_step_with_the_true_x0_keeps_the_noise(level: NoiseLevel, following: NoiseLevel, pair):
    x0, noise = pair
    reached = step(add_noise(x0, noise, level), x0, level, following)
    torch.testing.assert_close(reached, add_noise(x0, noise, following), rtol=1e-9, atol=1e-9)


def test_a_noise_share_is_flows_sigma_and_keeps_the_ratio_of_noise_to_signal():
    sigma = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(noise_share(flow_level(sigma)), sigma)
    level = vp_level(torch.arange(1000), sdxl_table())
    share = noise_share(level)
    torch.testing.assert_close(share / (1 - share), level.sigma / level.alpha)
