"""The teacher takes a student's first steps, or noise in the prompt disturbs one."""

from dataclasses import replace

import pytest
import torch
from tests.exporting.conftest import PROMPTS, SEEDS
from tests.raising import refuses

from dpdmd_pipeline.backbones.base import conditioned, guided
from dpdmd_pipeline.backbones.options import PromptNoise, TeacherStart
from dpdmd_pipeline.backbones.tensor_files import save_weights
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.exporting.sample import draw_latents, encode, open_student, sample
from dpdmd_pipeline.exporting.starts import levels_between, noise_the_prompt, start_with_teacher

RUNTIME = {"device": "cpu", "dtype": "float32"}
WORLDS = ["sd3_shifted", "sdxl_renoise"]


def opened(exported, form="diffusers"):
    """A student, the embeddings of its prompts, and of the empty prompt."""
    teacher = None if form == "diffusers" else exported.teacher
    student = open_student(exported.file(form), teacher, **RUNTIME)
    cond = encode(exported.file(form), teacher, PROMPTS, batch_size=2, **RUNTIME)
    return student, cond, student.backbone.encode([""])


def started(student, uncond, options, teacher=None, scale=1.0):
    network = student.network if teacher is None else teacher
    return start_with_teacher(student.backbone, network, uncond, student.levels, options, scale)


@pytest.mark.parametrize(("name", "landing"), [("sd3_shifted", 1), ("sdxl_renoise", 1), ("sdxl_renoise", 2)])
def test_a_teacher_equal_to_the_student_with_its_steps_changes_nothing(exports, name, landing):
    """At the student's own levels; the ODE sampler, since the start does not re-noise."""
    student, cond, uncond = opened(exports[name])
    student = replace(student, header=replace(student.header, sampler="euler"))
    levels = student.backbone.student_schedule(student.header.grid, student.header.num_steps)
    start = started(student, uncond, TeacherStart(steps=landing, landing=landing))
    between = levels_between(student.backbone, levels[0], levels[landing], landing)
    torch.testing.assert_close(between.sigma, levels.sigma[: landing + 1])  # equal distances: the grid's own
    alone, ours = draw_latents(student, cond, SEEDS), draw_latents(student, cond, SEEDS, start)
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_student_finishes_what_the_guided_teacher_begins(exports, name, scale):
    student, cond, uncond = opened(exports[name])
    teacher = student.backbone.load_model(exports[name].teacher / student.backbone.component).eval()
    start = started(student, uncond, TeacherStart(steps=3, landing=2), teacher, scale)
    backbone, renoises = student.backbone, student.header.sampler == "renoise"
    noise = noise_from_seeds(SEEDS, backbone.latent_shape)
    between = levels_between(backbone, student.levels[0], student.levels[2], 3)
    latents = rollout(guided(backbone, teacher, cond, uncond, scale), noise, between)
    torch.testing.assert_close(start.begin(cond, noise, SEEDS), latents, rtol=0, atol=0)
    if not renoises:
        latents = rollout(conditioned(backbone, student.network, cond), latents, student.levels[2:])
        torch.testing.assert_close(draw_latents(student, cond, SEEDS, start), latents, rtol=0, atol=0)
    assert not torch.allclose(draw_latents(student, cond, SEEDS, start), draw_latents(student, cond, SEEDS), atol=0.01)


@pytest.mark.parametrize("name", WORLDS)
def test_the_levels_between_fall_evenly_from_start_to_landing(exports, name):
    student, *_ = opened(exports[name])
    levels = levels_between(student.backbone, student.levels[0], student.levels[1], 4)
    assert len(levels) == 5 and (levels.sigma.diff() < 0).all()
    for ours, end in zip((levels[0], levels[-1]), (student.levels[0], student.levels[1]), strict=True):
        torch.testing.assert_close(ours.sigma, end.sigma, rtol=0, atol=0)
        torch.testing.assert_close(ours.alpha, end.alpha, rtol=0, atol=0)
    gaps = levels.timestep.float().diff()
    assert gaps.max() - gaps.min() <= 1.0  # a table has whole timesteps


def test_evaluations_count_both_halves_of_guidance():
    assert TeacherStart(steps=3).evaluations(2.0) == 6
    assert TeacherStart(steps=3).evaluations(1.0) == 3
    assert TeacherStart(steps=3, guidance_scale=1.0).evaluations(2.0) == 3


@pytest.mark.parametrize("form", ["diffusers", "comfyui", "lora"])
def test_sample_starts_every_kind_of_export(exports, form):
    exported, options = exports["sd3_lora"], TeacherStart(steps=2, guidance_scale=2.0)
    pictures = sample(
        exported.file(form), PROMPTS, SEEDS, teacher=exported.teacher, device="cpu", teacher_start=options
    )
    student, cond, uncond = opened(exported, form)
    teacher = student.backbone.load_model(exported.teacher / student.backbone.component).eval()
    latents = draw_latents(student, cond, SEEDS, started(student, uncond, options, teacher))
    torch.testing.assert_close(pictures, student.backbone.decode(latents), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(pictures, student.backbone.decode(draw_latents(student, cond, SEEDS)), atol=1e-4)


# ---- noise in the prompt


def test_noise_in_the_prompt_is_by_seed_whatever_the_batch(exports):
    student, cond, _ = opened(exports["sd3_shifted"])
    start = noise_the_prompt(student.backbone, student.network, student.levels, PromptNoise(strength=3.0))
    together = draw_latents(student, cond, SEEDS, start)
    alone = draw_latents(student, {name: value[1:2] for name, value in cond.items()}, SEEDS[1:2], start)
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)
    faint = noise_the_prompt(student.backbone, student.network, student.levels, PromptNoise(strength=1e-7))
    torch.testing.assert_close(
        draw_latents(student, cond, SEEDS, faint), draw_latents(student, cond, SEEDS), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(together, draw_latents(student, cond, SEEDS), atol=0.01)


# ---- refusals


def test_a_start_needs_a_teacher_and_leaves_the_student_a_step(exports):
    exported = exports["sd3_shifted"]
    with refuses(ValueError, "teacher_start", "teacher="):
        sample(exported.file("diffusers"), PROMPTS, SEEDS, device="cpu", teacher_start=TeacherStart(steps=2))
    student, _, uncond = opened(exported)
    with refuses(ValueError, "landing", "4", "1 to 3"):
        started(student, uncond, TeacherStart(steps=2, landing=4))


def test_more_steps_than_timesteps_between_are_refused(exports):
    student, _, uncond = opened(exports["sdxl_renoise"])
    with refuses(ValueError, "timesteps"):
        started(student, uncond, TeacherStart(steps=400))


def test_a_student_without_recipe_needs_a_guidance_scale(exports, tmp_path):
    exported = exports["sd3_shifted"]
    student = open_student(exported.file("comfyui"), exported.teacher, **RUNTIME)
    file = tmp_path / "student.safetensors"
    save_weights(file, student.network.state_dict(), replace(student.header, recipe=None).metadata())
    with refuses(ValueError, "guidance_scale", "recipe"):
        sample(file, PROMPTS, SEEDS, teacher=exported.teacher, device="cpu", teacher_start=TeacherStart(steps=2))
