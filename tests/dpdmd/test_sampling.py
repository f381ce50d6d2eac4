"""Rollouts against the exact ODE of a Gaussian teacher; noise by the seed of an image."""

import math

import pytest
import torch
from gaussian import PATHS, make_gaussian, vp_levels
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.raising import refuses

from dpdmd_pipeline.dpdmd.noise import flow_level
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout, sample_seeds, trajectory, uniform_from_seeds

SHAPE = (2, 3, 3)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the oracle itself


@pytest.mark.parametrize("levels", [make(20) for make in PATHS.values()], ids=PATHS)
def test_the_gaussian_denoiser_is_the_posterior_mean(levels):
    gaussian, latents = make_gaussian((1, 1, 1)), torch.tensor(0.7, dtype=torch.float64)
    mean, std = gaussian.mean.item(), gaussian.std.item()
    x0 = torch.linspace(mean - 12 * std, mean + 12 * std, 200_001, dtype=torch.float64)
    for level in levels[:-1]:  # Bayes' rule, integrated on a grid
        log_joint = -0.5 * ((x0 - mean) / std) ** 2 - 0.5 * ((latents - level.alpha * x0) / level.sigma) ** 2
        posterior_mean = (torch.softmax(log_joint, 0) * x0).sum()
        torch.testing.assert_close(gaussian.denoise(latents, level).squeeze(), posterior_mean, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("levels", [make(20) for make in PATHS.values()], ids=PATHS)
def test_the_gaussian_score_is_the_gradient_of_its_density_and_obeys_tweedie(levels):
    gaussian, latents = make_gaussian(SHAPE), randn(0, *SHAPE).requires_grad_()
    for level in levels[1:-1]:
        density = torch.distributions.Normal(level.alpha * gaussian.mean, gaussian.spread(level))
        (gradient,) = torch.autograd.grad(density.log_prob(latents).sum(), latents)
        torch.testing.assert_close(gaussian.score(latents, level), gradient)
        tweedie = (latents + level.sigma**2 * gaussian.score(latents, level)) / level.alpha
        torch.testing.assert_close(gaussian.denoise(latents, level), tweedie)


def test_the_gaussian_solution_moves_with_the_velocity_of_the_flow():
    gaussian, start, delta = make_gaussian(SHAPE), flow_level(torch.tensor(0.6, dtype=torch.float64)), 1e-5
    latents = randn(0, *SHAPE)
    ahead, behind = (gaussian.solve(latents, start, flow_level(start.sigma + d)) for d in (delta, -delta))
    velocity = (latents - gaussian.denoise(latents, start)) / start.sigma
    torch.testing.assert_close((ahead - behind) / (2 * delta), velocity, rtol=1e-6, atol=1e-6)


# ---- rollouts


@pytest.mark.parametrize("path", PATHS)
def test_rollout_converges_to_the_exact_ode_solution_at_first_order(path):
    gaussian, noise = make_gaussian(SHAPE), randn(0, 4, *SHAPE)
    errors = []
    for num_steps in (250, 500, 1000):
        levels = vp_levels(num_steps, total=1000 * 8) if path == "vp" else PATHS[path](num_steps)
        exact = gaussian.solve(noise, levels[0], levels[-1])
        errors.append((rollout(gaussian.denoise, noise, levels) - exact).abs().max().item())
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.2)
    assert errors[1] / errors[2] == pytest.approx(2, abs=0.1)


def test_a_perfect_step_is_exact_whatever_the_grid():
    gaussian, noise = make_gaussian(SHAPE), randn(0, 4, *SHAPE)
    for make in PATHS.values():
        levels = make(4)
        ends = dict(zip(levels.timestep[:-1].tolist(), levels[1:], strict=True))
        student = lambda latents, level, ends=ends: gaussian.one_step(latents, level, ends[level.timestep.item()])  # noqa: E731
        for end, latents in zip(levels[1:], trajectory(student, noise, levels), strict=True):
            torch.testing.assert_close(latents, gaussian.solve(noise, levels[0], end), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("levels", [make(5) for make in PATHS.values()], ids=PATHS)
def test_rollout_is_the_end_of_the_trajectory_and_of_its_parts(levels):
    gaussian, noise = make_gaussian(SHAPE), randn(0, 2, *SHAPE)
    path = list(trajectory(gaussian.denoise, noise, levels))
    assert len(path) == 5
    assert torch.equal(path[-1], rollout(gaussian.denoise, noise, levels))
    half_way = rollout(gaussian.denoise, noise, levels[:3])
    assert torch.equal(half_way, path[1])
    assert torch.equal(rollout(gaussian.denoise, half_way, levels[2:]), path[-1])
    assert torch.equal(rollout(gaussian.denoise, noise, levels[:1]), noise)


def test_gradients_flow_through_every_step_of_a_rollout():
    weight = torch.ones(4, requires_grad=True)
    steps = iter(range(4))
    x0 = rollout(lambda latents, level: weight[next(steps)] * latents.tanh(), randn(0, 1, *SHAPE), PATHS["flow"](4))
    x0.square().sum().backward()
    assert bool((weight.grad != 0).all())


# ---- noise


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=9), data=st.data())
def test_noise_is_the_same_bit_for_bit_however_a_batch_is_split(seeds, data):
    cut = data.draw(st.integers(1, len(seeds) - 1))
    whole = noise_from_seeds(seeds, SHAPE)
    parts = torch.cat([noise_from_seeds(seeds[:cut], SHAPE), noise_from_seeds(torch.tensor(seeds[cut:]), SHAPE)])
    assert torch.equal(whole, parts)
    assert torch.equal(whole.flip(0), noise_from_seeds(seeds[::-1], SHAPE))
    uniform = torch.cat([uniform_from_seeds(seeds[:cut]), uniform_from_seeds(seeds[cut:])])
    assert torch.equal(uniform_from_seeds(seeds), uniform)


def test_noise_differs_from_seed_to_seed_and_is_unit_gaussian():
    noise = noise_from_seeds(range(2000), (16, 8, 8)).flatten(1)
    assert noise.dtype == torch.float32
    assert len(noise.unique(dim=0)) == 2000
    assert abs(noise.mean()) < 4 / math.sqrt(noise.numel())
    assert abs(noise.var() - 1) < 4 * math.sqrt(2 / noise.numel())
    correlation = (noise[:-1] * noise[1:]).mean(1)  # neighbouring seeds
    assert correlation.abs().max() < 5.5 / math.sqrt(1024)


@pytest.mark.parametrize("seed", [-1, 2**32, 7 + 2**32])
def test_a_seed_that_would_mean_another_is_refused(seed):
    with refuses(ValueError, f"seed {seed}", "4294967295"):
        noise_from_seeds([7, seed], SHAPE)


def test_drawing_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    noise_from_seeds([1, 2], SHAPE), uniform_from_seeds([1, 2])
    assert torch.equal(torch.get_rng_state(), before)


def test_uniform_numbers_fill_the_unit_interval():
    uniform = uniform_from_seeds(sample_seeds(0, "level", 0, 4000)).double().sort().values
    assert uniform[0] >= 0 and uniform[-1] < 1
    ideal = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    assert (uniform - ideal).abs().max() < 1.95 / math.sqrt(4000)  # Kolmogorov-Smirnov, p = 0.001


def test_seeds_depend_on_run_stream_step_and_batch_index_and_on_nothing_else():
    assert sample_seeds(3, "noise", 5, 8)[:4] == sample_seeds(3, "noise", 5, 4)
    keys = [(run, stream, step) for run in range(4) for stream in ("noise", "level", "renoise") for step in range(20)]
    seeds = [seed for key in keys for seed in sample_seeds(*key, 16)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**32 for seed in seeds)
    # golden: a resumed run, another process or another machine must draw these
    assert sample_seeds(3, "noise", 5, 2) == [326780734, 1873956644]
