"""Algorithm 1: against a second implementation written from the paper, and by where its gradients go."""

from itertools import pairwise

import pytest
import torch
from gaussian import PATHS, flow_levels, make_gaussian, sdxl_table, vp_levels
from torch import nn

from dpdmd_pipeline.dpdmd.algorithm import fake_score_update_loss, student_loss, student_pictures
from dpdmd_pipeline.dpdmd.anchor import AnchoredStep, anchored_steps, teacher_anchors
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, flow_level, vp_level, x0_from_eps, x0_from_velocity
from dpdmd_pipeline.dpdmd.sampling import rollout

SHAPE = (2, 3, 3)
BATCH = 3
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def randn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Network(nn.Module):
    """A small MLP of latents, timestep and a prompt; each test defines the meaning of its output."""

    def __init__(self, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            size = torch.Size(SHAPE).numel()
            self.layers = nn.Sequential(nn.Linear(size + 2, 24), nn.Tanh(), nn.Linear(24, size)).double()

    def forward(self, latents, timestep, prompt=1.0):
        timestep = torch.as_tensor(timestep, dtype=torch.float64).reshape(-1, 1).expand(len(latents), 1) / 1000
        inputs = torch.cat([latents.flatten(1), timestep, torch.full_like(timestep, prompt)], dim=1)
        return self.layers(inputs).view_as(latents)

    def guided(self, latents, timestep, scale=3.5):
        cond, uncond = self(latents, timestep, 1.0), self(latents, timestep, 0.0)
        return uncond + scale * (cond - uncond)


def networks():
    return Network(1), Network(2), Network(3)  # student, teacher, fake score


def gradients(loss, network):
    return torch.autograd.grad(loss, list(network.parameters()), retain_graph=True)


def denoiser(x0_from, output):
    return lambda latents, level: x0_from(latents, output(latents, level.timestep), level)


def batch(level):
    return {"noise": randn(10, BATCH, *SHAPE), "renoise": randn(11, BATCH, *SHAPE), "level": level}


FLOW_BATCH = batch(flow_level(torch.tensor([0.9, 0.5, 0.13], dtype=torch.float64).view(-1, 1, 1, 1)))


# ---- the paper's flow case, in velocities


def paper_flow(student, teacher, fake_score, *, noise, renoise, t, teacher_grid, anchor_steps, grid, detach, divide):
    """Algorithm 1 as printed, on numbers and velocities; no code of the project."""
    z = noise
    if anchor_steps:
        for now, then in pairwise(teacher_grid[: anchor_steps + 1]):
            z = z + (then - now) * teacher.guided(z, 1000 * now).detach()
        v_target = (noise - z) / (1 - teacher_grid[anchor_steps])  # eq. 6
        v1 = student(noise, 1000.0)
        loss_div = (v1 - v_target).pow(2).mean()  # eq. 7
        x = noise + (grid[1] - grid[0]) * v1
        x, rest = (x.detach() if detach else x), grid[1:]
    else:
        loss_div, x, rest = torch.zeros(()), noise, grid
    for now, then in pairwise(rest):
        x = x + (then - now) * student(x, 1000 * now)
    z_t = ((1 - t) * x + t * renoise).detach()
    real = z_t - t * teacher.guided(z_t, 1000 * t).detach()
    fake = z_t - t * fake_score(z_t, 1000 * t).detach()
    size = ((z_t if divide == "noisy" else x.detach()) - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    direction = (fake - real) / size
    return loss_div, 0.5 * (x - (x - direction).detach()).pow(2).mean()


@pytest.mark.parametrize("divide", ["noisy", "x0"])
@pytest.mark.parametrize(("anchor_steps", "stop_gradient"), [(5, True), (5, False), (10, True), (0, False)], ids=str)
@pytest.mark.parametrize("grid", [[1, 0.75, 0.5, 0.25, 0], [1, 0.8577, 0.6022, 0.0089, 0]], ids=["even", "published"])
def test_the_student_update_is_algorithm_1_of_the_paper(grid, anchor_steps, stop_gradient, divide):
    student, teacher, fake_score = networks()
    teacher_denoises, teacher_levels = denoiser(x0_from_velocity, teacher.guided), flow_levels(30)
    noise = FLOW_BATCH["noise"]
    anchored = []
    if anchor_steps:
        with torch.no_grad():
            anchors = teacher_anchors(teacher_denoises, noise, teacher_levels, [anchor_steps])
        anchored = anchored_steps(noise, anchors, teacher_levels[0], [teacher_levels[anchor_steps]])
    ours = student_loss(
        denoiser(x0_from_velocity, student),
        teacher_denoises,
        denoiser(x0_from_velocity, fake_score),
        anchored=anchored,
        levels=flow_level(torch.tensor(grid, dtype=torch.float64)),
        stop_gradient=stop_gradient,
        normalizer=divide,
        space="v",
        **FLOW_BATCH,
    )
    diversity, dmd = paper_flow(
        student,
        teacher,
        fake_score,
        noise=noise,
        renoise=FLOW_BATCH["renoise"],
        t=FLOW_BATCH["level"].sigma,
        teacher_grid=[1 - index / 30 for index in range(31)],
        anchor_steps=anchor_steps,
        grid=grid,
        detach=stop_gradient,
        divide=divide,
    )
    torch.testing.assert_close(ours.dmd, dmd, **TOLERANCE)
    torch.testing.assert_close(ours.diversity.double(), diversity.double(), **TOLERANCE)
    weight = 0.05 if anchor_steps else 0
    for mine, printed in zip(
        gradients(ours.dmd + weight * ours.diversity, student),
        gradients(dmd + weight * diversity, student),
        strict=True,
    ):
        assert printed.abs().max() > 1e-6
        torch.testing.assert_close(mine, printed, **TOLERANCE)


def test_the_fake_score_update_is_flow_matching_on_the_students_samples():
    student, _, fake_score = networks()
    grid, t = [1, 0.75, 0.5, 0.25, 0], FLOW_BATCH["level"].sigma
    levels = flow_level(torch.tensor(grid, dtype=torch.float64))
    loss = fake_score_update_loss(
        denoiser(x0_from_velocity, fake_score),
        x0=student_pictures(denoiser(x0_from_velocity, student), FLOW_BATCH["noise"], levels),
        renoise=FLOW_BATCH["renoise"],
        level=FLOW_BATCH["level"],
    )
    x = FLOW_BATCH["noise"]
    for now, then in pairwise(grid):
        x = (x + (then - now) * student(x, 1000 * now)).detach()
    z_t = (1 - t) * x + t * FLOW_BATCH["renoise"]
    expected = (fake_score(z_t, 1000 * t) - (FLOW_BATCH["renoise"] - x)).pow(2).mean()
    torch.testing.assert_close(loss, expected, **TOLERANCE)
    for mine, printed in zip(gradients(loss, fake_score), gradients(expected, fake_score), strict=True):
        torch.testing.assert_close(mine, printed, **TOLERANCE)


def test_each_update_trains_its_own_network_only():
    student, teacher, fake_score = networks()
    roles = [denoiser(x0_from_velocity, net) for net in (student, teacher, fake_score)]
    levels = flow_levels(4)
    anchored = anchored_steps(FLOW_BATCH["noise"], [randn(5, BATCH, *SHAPE)], levels[0], [levels[1]])
    options = {"stop_gradient": True, "normalizer": "noisy", "space": "v"}
    losses = student_loss(*roles, anchored=anchored, levels=levels, **options, **FLOW_BATCH)
    (losses.dmd + losses.diversity).backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for net in (teacher, fake_score) for parameter in net.parameters())
    student.zero_grad(set_to_none=True)
    x0 = student_pictures(roles[0], FLOW_BATCH["noise"], levels)
    fake_score_update_loss(roles[2], x0=x0, renoise=FLOW_BATCH["renoise"], level=FLOW_BATCH["level"]).backward()
    assert all(parameter.grad is not None for parameter in fake_score.parameters())
    assert all(parameter.grad is None for parameter in student.parameters())


# ---- the paper's SDXL case, in eps


def paper_eps(student, teacher, fake_score, *, noise, renoise, alpha_bar, timestep, teacher_steps, anchor_steps, steps):
    """Eqs. 39-41 of the paper as printed, with DDIM in its textbook form; no code of the project."""

    def ddim(z, eps, now, then):
        a, b = alpha_bar[now], alpha_bar[then] if then >= 0 else torch.ones((), dtype=torch.float64)
        return b.sqrt() * (z - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps

    z = noise
    for now, then in pairwise(teacher_steps[: anchor_steps + 1]):
        z = ddim(z, teacher.guided(z, now).detach(), now, then)
    a = alpha_bar[teacher_steps[anchor_steps]]
    x_tilde = (z - (1 - a).sqrt() * teacher.guided(z, teacher_steps[anchor_steps]).detach()) / a.sqrt()  # eq. 39
    first = alpha_bar[steps[0]]
    eps = student(noise, steps[0])
    x_theta = (noise - (1 - first).sqrt() * eps) / first.sqrt()  # eq. 40
    loss_div = (x_theta - x_tilde).pow(2).mean()  # eq. 41
    x = ddim(noise, eps, steps[0], steps[1]).detach()
    for now, then in pairwise(steps[1:]):
        x = ddim(x, student(x, now), now, then)
    a = alpha_bar[timestep].view(-1, 1, 1, 1)
    z_t = (a.sqrt() * x + (1 - a).sqrt() * renoise).detach()
    real = (z_t - (1 - a).sqrt() * teacher.guided(z_t, timestep).detach()) / a.sqrt()
    fake = (z_t - (1 - a).sqrt() * fake_score(z_t, timestep).detach()) / a.sqrt()
    direction = (fake - real) / (z_t - real).abs().mean(dim=(1, 2, 3), keepdim=True)
    return loss_div, 0.5 * (x - (x - direction).detach()).pow(2).mean(), x_tilde


def test_the_student_update_with_the_tangent_target_is_the_papers_sdxl_case():
    student, teacher, fake_score = networks()
    table, timestep, anchor_steps = sdxl_table(), torch.tensor([950, 500, 40]), 5
    teacher_denoises, teacher_levels = denoiser(x0_from_eps, teacher.guided), vp_levels(50)
    draws = batch(vp_level(timestep.view(-1, 1, 1, 1), table))
    with torch.no_grad():
        anchor = rollout(teacher_denoises, draws["noise"], teacher_levels[: anchor_steps + 1])
        tangent = teacher_denoises(anchor, teacher_levels[anchor_steps])
    diversity, dmd, x_tilde = paper_eps(
        student,
        teacher,
        fake_score,
        noise=draws["noise"],
        renoise=draws["renoise"],
        alpha_bar=table,
        timestep=timestep,
        teacher_steps=list(range(999, -1, -20)),
        anchor_steps=anchor_steps,
        steps=[999, 749, 499, 249, -1],
    )
    torch.testing.assert_close(tangent, x_tilde, **TOLERANCE)
    ours = student_loss(
        denoiser(x0_from_eps, student),
        teacher_denoises,
        denoiser(x0_from_eps, fake_score),
        anchored=[AnchoredStep(draws["noise"], vp_levels(4)[0], tangent)],
        levels=vp_levels(4),
        stop_gradient=True,
        normalizer="noisy",
        space="x0",
        **draws,
    )
    torch.testing.assert_close(ours.diversity, diversity, **TOLERANCE)
    torch.testing.assert_close(ours.dmd, dmd, **TOLERANCE)
    total, printed_total = (d + 0.05 * e for d, e in ((ours.dmd, ours.diversity), (dmd, diversity)))
    for mine, printed in zip(gradients(total, student), gradients(printed_total, student), strict=True):
        torch.testing.assert_close(mine, printed, **TOLERANCE)


# ---- reach of the gradients: a student with parameters of its own at every level


class PerLevelStudent:
    """x0 = gain_i * latents + offset_i, with other parameters at each level of the schedule."""

    def __init__(self, levels: NoiseLevel):
        self.index = {timestep: index for index, timestep in enumerate(levels.timestep[:-1].tolist())}
        count = len(levels) - 1
        self.parameters = [
            torch.stack([0.5 + 0.1 * randn(index, ()), randn(50 + index, ())]).requires_grad_()
            for index in range(count)
        ]
        self.calls: list[int] = []

    def __call__(self, latents, level):
        index = self.index[level.timestep.item()]
        self.calls.append(index)
        gain, offset = self.parameters[index]
        return gain * latents + offset

    def reached_by(self, loss) -> list[bool]:
        """Per level, True if the loss has a gradient there."""
        if not loss.requires_grad:
            return [False] * len(self.parameters)
        slopes = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True)
        return [slope is not None and bool((slope != 0).all()) for slope in slopes]


def per_level_update(path, anchored_count, stop_gradient, num_steps=4):
    levels, gaussian = PATHS[path](num_steps), make_gaussian(SHAPE)
    noise = randn(10, BATCH, *SHAPE)
    ends = levels[1 : anchored_count + 1]
    anchored = anchored_steps(noise, [gaussian.solve(noise, levels[0], end) for end in ends], levels[0], ends)
    student = PerLevelStudent(levels)
    level = flow_level(torch.full((BATCH, 1, 1, 1), 0.5, dtype=torch.float64))
    losses = student_loss(
        student,
        gaussian.denoise,
        make_gaussian(SHAPE, seed=1).denoise,
        noise=noise,
        anchored=anchored,
        levels=levels,
        renoise=randn(11, BATCH, *SHAPE),
        level=level,
        stop_gradient=stop_gradient,
        normalizer="noisy",
        space="v",
    )
    return student, anchored, losses


paths = pytest.mark.parametrize("path", PATHS)


@paths
@pytest.mark.parametrize("anchored_count", [1, 2, 3])
def test_no_dmd_gradient_reaches_an_anchored_step(path, anchored_count):
    student, _, losses = per_level_update(path, anchored_count, stop_gradient=True)
    assert student.reached_by(losses.dmd) == [index >= anchored_count for index in range(4)]


@paths
@pytest.mark.parametrize("anchored_count", [1, 2, 3])
def test_without_stop_gradient_the_dmd_gradient_reaches_every_step(path, anchored_count):
    student, _, losses = per_level_update(path, anchored_count, stop_gradient=False)
    assert student.reached_by(losses.dmd) == [True] * 4


@paths
@pytest.mark.parametrize("stop_gradient", [True, False])
@pytest.mark.parametrize("anchored_count", [1, 2, 3])
def test_the_diversity_gradient_reaches_the_anchored_steps_only(path, anchored_count, stop_gradient):
    student, _, losses = per_level_update(path, anchored_count, stop_gradient)
    assert student.reached_by(losses.diversity) == [index < anchored_count for index in range(4)]


@paths
def test_vanilla_dmd_has_no_anchored_step(path):
    for stop_gradient in (True, False):  # nothing to stop
        student, _, losses = per_level_update(path, 0, stop_gradient)
        assert losses.diversity == 0 and not losses.diversity.requires_grad
        assert student.reached_by(losses.dmd) == [True] * 4
        assert student.calls == [0, 1, 2, 3]


@paths
def test_stop_gradient_changes_gradients_and_no_value(path):
    for anchored_count in (1, 2, 3, 4):
        (_, _, stopped), (_, _, flowing) = (per_level_update(path, anchored_count, stop) for stop in (True, False))
        assert torch.equal(stopped.dmd, flowing.dmd) and torch.equal(stopped.diversity, flowing.diversity)


@paths
def test_several_anchored_steps_have_separate_errors_whose_mean_counts(path):
    student, anchored, losses = per_level_update(path, 3, stop_gradient=True)
    slopes = torch.autograd.grad(losses.diversity, student.parameters[:3])
    for index, (start, slope) in enumerate(zip(anchored, slopes, strict=True)):
        alone = ((student(start.latents, start.level) - start.target) / start.level.sigma).square().mean() / 3
        torch.testing.assert_close(slope, torch.autograd.grad(alone, student.parameters[index])[0])


@paths
def test_after_several_anchored_steps_the_student_goes_on_from_its_own_latents(path):
    """The samples of the DMD term are those of the student alone, whatever the anchors are."""
    pictures = []
    for anchored_count in (0, 1, 2, 3, 4):
        _, _, losses = per_level_update(path, anchored_count, stop_gradient=True)
        pictures.append(losses.dmd)
    torch.testing.assert_close(torch.stack(pictures), pictures[0].expand(5))


@paths
def test_the_first_target_and_the_first_step_share_one_forward_pass(path):
    assert per_level_update(path, 1, stop_gradient=True)[0].calls == [0, 1, 2, 3]
    assert sorted(per_level_update(path, 2, stop_gradient=True)[0].calls) == [0, 1, 1, 2, 3]


@paths
def test_a_perfect_student_has_no_loss_and_no_gradient(path):
    """The exact one-step maps: no diversity loss, the teacher's samples, no DMD gradient."""
    levels, gaussian = PATHS[path](4), make_gaussian(SHAPE)
    # At the exact path's start, so that the samples have the teacher's distribution: VP has some signal there.
    noise = levels[0].alpha * gaussian.mean + gaussian.spread(levels[0]) * randn(0, 8, *SHAPE)
    ends = dict(zip(levels.timestep[:-1].tolist(), levels[1:], strict=True))
    errors = torch.zeros(4, *SHAPE, dtype=torch.float64, requires_grad=True)

    def student(latents, level):
        index = levels.timestep.tolist().index(level.timestep.item())
        return gaussian.one_step(latents, level, ends[level.timestep.item()]) + errors[index]

    anchors = [gaussian.solve(noise, levels[0], levels[1])]
    losses = student_loss(
        student,
        gaussian.denoise,
        gaussian.denoise,
        noise=noise,
        anchored=anchored_steps(noise, anchors, levels[0], levels[1:2]),
        levels=levels,
        renoise=randn(1, 8, *SHAPE),
        level=flow_level(torch.full((8, 1, 1, 1), 0.5, dtype=torch.float64)),
        stop_gradient=True,
        normalizer="noisy",
        space="v",
    )
    assert losses.diversity < 1e-20
    (slope,) = torch.autograd.grad(losses.dmd + losses.diversity, errors)
    assert slope.abs().max() < 1e-10
    x0 = rollout(student, noise, levels)
    torch.testing.assert_close(x0, gaussian.solve(noise, levels[0], levels[-1]), rtol=1e-8, atol=1e-8)
