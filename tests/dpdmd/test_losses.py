"""The three losses: each gradient is its formula."""

import pytest
import torch
from gaussian import Gaussian, flow_levels, make_gaussian, sdxl_table, vp_levels

from dpdmd_pipeline.dpdmd.losses import diversity_loss, dmd_loss, fake_score_loss
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, add_noise, flow_level, vp_level, vp_schedule

SHAPE = (2, 3, 3)
SIGMAS = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64).view(-1, 1, 1, 1)
LEVELS = {
    "flow": flow_level(SIGMAS),
    "vp": vp_level(torch.tensor([980, 400, 20]).view(-1, 1, 1, 1), sdxl_table()),
}
per_sample_levels = pytest.mark.parametrize("level", LEVELS.values(), ids=LEVELS)


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss, leaf):
    return torch.autograd.grad(loss, leaf)[0]


# ---- dmd


@pytest.mark.parametrize("normalizer", ["noisy", "x0"])
def test_the_dmd_gradient_is_the_published_formula(normalizer):
    x0, noisy, real, fake = (randn(seed, 3, *SHAPE).requires_grad_() for seed in range(4))
    loss = dmd_loss(x0, noisy, real, fake, normalizer)
    reference = {"noisy": noisy, "x0": x0}[normalizer]
    scale = torch.stack([(r - t).abs().sum() / t.numel() for r, t in zip(reference, real, strict=True)])
    expected = (fake - real) / scale.view(3, 1, 1, 1) / x0.numel()
    torch.testing.assert_close(gradient(loss, x0), expected.detach(), rtol=1e-12, atol=1e-14)
    loss = dmd_loss(x0, noisy, real, fake, normalizer)
    loss.backward()
    assert noisy.grad is None and real.grad is None and fake.grad is None


@pytest.mark.parametrize("normalizer", ["noisy", "x0"])
def test_a_picture_has_the_dmd_gradient_that_it_has_alone(normalizer):
    tensors = [randn(seed, 3, *SHAPE) for seed in range(4)]
    tensors[2][1] *= 100  # one sample of another size must not change its neighbours
    x0 = tensors[0].requires_grad_()
    together = gradient(dmd_loss(*tensors, normalizer), x0)
    for index in range(3):
        alone = [tensor[index : index + 1].detach() for tensor in tensors]
        leaf = alone[0].requires_grad_()
        torch.testing.assert_close(together[index], gradient(dmd_loss(*alone, normalizer), leaf)[0] / 3)


def test_the_dmd_loss_stays_finite_where_teacher_and_picture_agree():
    x0 = randn(0, 2, *SHAPE).requires_grad_()
    loss = dmd_loss(x0, x0.detach(), x0.detach(), x0.detach(), "x0")
    assert loss == 0 and bool((gradient(loss, x0) == 0).all())


# ---- fake score


def test_the_fake_score_loss_is_the_velocity_loss_of_flow():
    level, x0, noise, denoised = LEVELS["flow"], *(randn(seed, 3, *SHAPE) for seed in range(3))
    predicted = (add_noise(x0, noise, level) - denoised) / level.sigma
    expected = (predicted - (noise - x0)).square().mean()
    torch.testing.assert_close(fake_score_loss(denoised, x0, level), expected, rtol=1e-12, atol=0)


def test_the_fake_score_loss_is_the_v_prediction_loss_of_vp():
    level, x0, noise, denoised = LEVELS["vp"], *(randn(seed, 3, *SHAPE) for seed in range(3))
    # the v_prediction from which x0_from_v_prediction gives `denoised`
    predicted = (level.alpha * add_noise(x0, noise, level) - denoised) / level.sigma
    expected = (predicted - (level.alpha * noise - level.sigma * x0)).square().mean()
    torch.testing.assert_close(fake_score_loss(denoised, x0, level), expected, rtol=1e-10, atol=0)


@per_sample_levels
def test_the_fake_score_gradient_is_its_formula(level):
    denoised, x0 = randn(0, 3, *SHAPE).requires_grad_(), randn(1, 3, *SHAPE)
    expected = 2 * (denoised - x0) / level.sigma**2 / x0.numel()
    torch.testing.assert_close(gradient(fake_score_loss(denoised, x0, level), denoised), expected.detach())


# ---- diversity


@per_sample_levels
def test_the_diversity_loss_in_v_space_is_the_error_of_the_networks_output(level):
    latents, denoised, target = (randn(seed, 3, *SHAPE) for seed in range(3))

    def velocity(x0):  # noise - x0 for flow, alpha noise - sigma x0 for VP
        noise = (latents - level.alpha * x0) / level.sigma
        return noise - x0 if level is LEVELS["flow"] else level.alpha * noise - level.sigma * x0

    expected = (velocity(denoised) - velocity(target)).square().mean()
    torch.testing.assert_close(diversity_loss(denoised, target, level, "v"), expected, rtol=1e-10, atol=0)


@per_sample_levels
def test_the_diversity_loss_in_eps_space_is_the_error_of_the_noise(level):
    latents, denoised, target = (randn(seed, 3, *SHAPE) for seed in range(3))
    eps, target_eps = ((latents - level.alpha * x0) / level.sigma for x0 in (denoised, target))
    expected = (eps - target_eps).square().mean()
    torch.testing.assert_close(diversity_loss(denoised, target, level, "eps"), expected, rtol=1e-10, atol=0)


@per_sample_levels
@pytest.mark.parametrize("space", ["x0", "v", "eps"])
def test_the_diversity_gradient_is_its_formula(level, space):
    denoised, target = randn(0, 3, *SHAPE).requires_grad_(), randn(1, 3, *SHAPE)
    weight = {"x0": torch.ones(()), "v": level.sigma**-2, "eps": (level.alpha / level.sigma) ** 2}[space]
    expected = 2 * weight * (denoised - target) / target.numel()
    torch.testing.assert_close(gradient(diversity_loss(denoised, target, level, space), denoised), expected.detach())


def test_at_an_sdxl_start_x0_weighs_an_error_213_6_times_as_much_as_eps():
    start, denoised, target = vp_schedule(4, sdxl_table())[0], randn(0, 1, *SHAPE), randn(1, 1, *SHAPE)
    in_x0, in_v, in_eps = (diversity_loss(denoised, target, start, space) for space in ("x0", "v", "eps"))
    assert in_x0 / in_eps == pytest.approx(213.6, abs=0.05)
    assert in_v / in_x0 == pytest.approx(1, abs=0.01)


def test_at_sigma_1_of_flow_x0_and_v_weigh_the_same_and_eps_nothing():
    start, denoised, target = flow_levels(4)[0], randn(0, 1, *SHAPE), randn(1, 1, *SHAPE)
    in_x0, in_v, in_eps = (diversity_loss(denoised, target, start, space) for space in ("x0", "v", "eps"))
    assert in_x0 == in_v > 0
    assert in_eps == 0  # pure noise says nothing of x0: this space cannot teach a flow model's first step


# ---- with Gaussian teacher and student, where both scores are exact


def dmd_gradient(x0: torch.Tensor, teacher: Gaussian, fake: Gaussian, level: NoiseLevel) -> torch.Tensor:
    x0 = x0.detach().requires_grad_()
    noisy = add_noise(x0.detach(), randn(9, *x0.shape), level)
    return gradient(dmd_loss(x0, noisy, teacher.denoise(noisy, level), fake.denoise(noisy, level), "noisy"), x0)


@pytest.mark.parametrize("levels", [flow_levels(10), vp_levels(10)], ids=["flow", "vp"])
def test_the_dmd_gradient_vanishes_where_the_student_draws_as_the_teacher(levels):
    teacher = make_gaussian(SHAPE)
    x0 = teacher.mean + teacher.std * randn(0, 64, *SHAPE)
    for level in levels[:-1]:
        assert bool((dmd_gradient(x0, teacher, teacher, level) == 0).all())


@pytest.mark.parametrize("levels", [flow_levels(10), vp_levels(10)], ids=["flow", "vp"])
def test_a_descent_on_the_dmd_gradient_moves_the_student_towards_the_teacher(levels):
    teacher, shift = make_gaussian(SHAPE), randn(1, *SHAPE)
    moved = Gaussian(teacher.mean + shift, teacher.std)
    x0 = moved.mean + moved.std * randn(0, 64, *SHAPE)
    for level in levels[:-1]:
        towards = -dmd_gradient(x0, teacher, moved, level)
        assert bool((towards * -shift > 0).all())  # every element of every picture
    # too narrow: pictures spread outwards; too wide: inwards
    for factor, sign in ((0.5, 1), (2.0, -1)):
        scaled = Gaussian(teacher.mean, factor * teacher.std)
        x0 = scaled.mean + scaled.std * randn(0, 4096, *SHAPE)
        outwards = -(dmd_gradient(x0, teacher, scaled, levels[5]) * (x0 - scaled.mean)).mean(0)
        assert bool((outwards * sign > 0).all())


def test_dmd_with_the_exact_fake_score_trains_a_generator_to_the_teachers_distribution():
    teacher = make_gaussian(SHAPE)
    mean, spread = torch.zeros(SHAPE).double().requires_grad_(), torch.ones(SHAPE).double().requires_grad_()
    optimizer = torch.optim.Adam([mean, spread], lr=0.05)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.01, 400)
    for update in range(400):
        x0 = mean + spread * randn(3 * update, 128, *SHAPE)
        level = flow_level(
            0.02 + 0.96 * torch.rand(128, 1, 1, 1, generator=torch.Generator().manual_seed(update)).double()
        )
        noisy = add_noise(x0, randn(3 * update + 1, 128, *SHAPE), level)
        with torch.no_grad():
            real, fake = teacher.denoise(noisy, level), Gaussian(mean, spread).denoise(noisy, level)
        optimizer.zero_grad()
        dmd_loss(x0, noisy, real, fake, "noisy").backward()
        optimizer.step()
        scheduler.step()
    torch.testing.assert_close(mean.detach(), teacher.mean, rtol=0, atol=0.03)
    torch.testing.assert_close(spread.detach(), teacher.std, rtol=0, atol=0.03)


@pytest.mark.parametrize("levels", [flow_levels(5), vp_levels(5)], ids=["flow", "vp"])
def test_the_fake_score_loss_is_least_at_the_score_of_the_students_pictures(levels):
    student, count = make_gaussian(SHAPE), 20_000
    x0 = student.mean + student.std * randn(0, count, *SHAPE)
    for level in levels[:-1]:
        noisy = add_noise(x0, randn(1, count, *SHAPE), level)
        offset, gain = torch.zeros(SHAPE).double().requires_grad_(), torch.ones(SHAPE).double().requires_grad_()
        denoised = offset + gain * student.denoise(noisy, level)
        loss = fake_score_loss(denoised, x0, level)
        for slope in torch.autograd.grad(loss, (offset, gain)):
            per_sample = 2 * (denoised - x0).detach() / level.sigma**2 / student.mean.numel()
            noise_of_slope = (per_sample * student.denoise(noisy, level).abs().clamp(min=1)).std(0) / count**0.5
            assert bool((slope.abs() < 5 * noise_of_slope).all())
        shifted = fake_score_loss(student.denoise(noisy, level) + 0.1, x0, level)
        assert shifted > loss
