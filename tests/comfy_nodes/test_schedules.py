"""Schedules of the pack equal those of the package and of diffusers; bad ones are refused."""

import re
from dataclasses import replace

import pytest
import torch
from comfy_nodes.header import StudentHeader
from comfy_nodes.schedules import Levels
from tests.raising import refuses

from comfy_nodes import schedules
from dpdmd_pipeline.dpdmd import noise

FLOW = Levels("flow", None, published=True)
ALPHAS_CUMPROD = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2).cumprod(0)
TABLE = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()
EPS = Levels("eps", TABLE, published=True)
FLOW_STUDENT = StudentHeader("sd3", "full", "flow", "euler", sigmas=(1.0, 0.75, 0.5, 0.25, 0.0))
EPS_STUDENT = StudentHeader("sdxl", "full", "eps", "renoise", timesteps=(999, 749, 499, 249))


def sigmas_for(name, steps=4, levels=FLOW, header=None, custom=""):
    return schedules.sigmas_for(name, steps, levels, header, custom)[0]


# ---- oracles


@pytest.mark.parametrize("steps", range(1, 17))
@pytest.mark.parametrize("grid", ["diffusers", "shifted"])
def test_flow_schedules_equal_the_packages(steps, grid):
    assert torch.equal(schedules.flow_sigmas(steps, 3.0, grid), noise.flow_sigmas(steps, 3.0, grid))


@pytest.mark.parametrize("steps", range(1, 17))
def test_trailing_timesteps_equal_the_packages(steps):
    levels = noise.vp_schedule(steps, ALPHAS_CUMPROD)
    assert schedules.trailing_timesteps(steps) == levels.timestep[:-1].tolist()
    torch.testing.assert_close(sigmas_for("SDXL trailing", steps, EPS), levels.sigma / levels.alpha, rtol=1e-5, atol=0)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_the_official_schedule_equals_that_of_diffusers(steps):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(sigmas_for(schedules.OFFICIAL_FLOW, steps), scheduler.sigmas, rtol=0, atol=1e-7)


# ---- choice of a schedule


def test_a_students_own_levels_come_first():
    assert sigmas_for("auto", header=FLOW_STUDENT).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    trained = sigmas_for("auto", levels=EPS, header=EPS_STUDENT)
    assert torch.equal(trained[:-1], TABLE[[999, 749, 499, 249]]) and trained[-1] == 0


@pytest.mark.parametrize(
    ("levels", "published"),
    [(FLOW, schedules.OFFICIAL_FLOW), (EPS, "SDXL trailing"), (Levels("v", TABLE, published=False), "none")],
)
def test_without_a_header_a_schedule_must_be_chosen(levels, published):
    with refuses(ValueError, "DP-DMD header", "schedule", published, "Load DP-DMD Student"):
        sigmas_for("auto", levels=levels)
    chosen = "SDXL trailing" if published == "none" else published
    assert len(sigmas_for(chosen, levels=levels)) == 5


def test_an_unknown_schedule_is_refused():
    with refuses(ValueError, "'karras'", "auto", schedules.OFFICIAL_FLOW):
        sigmas_for("karras")


@pytest.mark.parametrize(
    ("steps", "levels"), [(4, [1.0, 0.75, 0.5, 0.25]), (3, [1.0, 0.75, 0.5]), (2, [1.0, 0.5]), (1, [1.0])]
)
def test_fewer_steps_are_trained_levels_from_the_first(steps, levels):
    assert sigmas_for("auto", steps, header=FLOW_STUDENT).tolist() == [*levels, 0.0]


@pytest.mark.parametrize("name", ["auto", "uniform (simple)"])
@pytest.mark.parametrize("trained", [[1.0, 0.5, 0.0], [1 - index / 20 for index in range(21)]])
def test_no_steps_are_as_many_as_the_student_was_trained_for(name, trained):
    student = replace(FLOW_STUDENT, sigmas=tuple(trained))
    assert len(sigmas_for(name, 0, header=student)) == len(trained)


def test_as_many_steps_as_trained_need_a_header():
    with refuses(ValueError, "steps is 0,", "header"):
        sigmas_for(schedules.OFFICIAL_FLOW, 0)


@pytest.mark.parametrize(
    ("levels", "facts"), [(FLOW, []), (EPS, ["eps", "v"]), (Levels("v", TABLE, False), ["v", "eps"])]
)
def test_a_model_without_a_header_is_sampled_with_a_warning_that_names_its_prediction(levels, facts):
    warning = schedules.warning_without_header(levels)
    assert warning.startswith("Warning: no DP-DMD header")
    assert re.findall(r"read as (\w+):.* predicts (\w+)\.$", warning) == ([tuple(facts)] if facts else [])


@pytest.mark.parametrize(
    ("name", "levels", "message"),
    [
        ("SDXL trailing", FLOW, "SDXL trailing.*flow.*SD3.5 official"),
        (schedules.OFFICIAL_FLOW, EPS, "SD3.5 official.*eps.*SDXL trailing"),
        ("uniform (simple)", EPS, "uniform.*eps.*SDXL trailing"),
    ],
)
def test_a_schedule_of_another_kind_of_model_is_refused(name, levels, message):
    with pytest.raises(ValueError, match=message):
        sigmas_for(name, levels=levels)


@pytest.mark.parametrize("steps", [17, -1, 2.5, 4.0, float("nan"), "4"])
@pytest.mark.parametrize("name", ["auto", schedules.OFFICIAL_FLOW])
def test_steps_out_of_range_or_not_whole_are_refused(name, steps):
    with refuses(ValueError, f"steps is {steps}:", "16"):
        sigmas_for(name, steps, header=FLOW_STUDENT)


def test_more_steps_than_trained_are_refused():
    with refuses(ValueError, "steps is 5,", "4"):
        sigmas_for("auto", 5, header=FLOW_STUDENT)


def test_a_student_in_a_model_set_to_another_prediction_is_refused():
    with refuses(ValueError, "student", "eps", "model", "v"):
        sigmas_for("auto", levels=Levels("v", TABLE, published=False), header=EPS_STUDENT)


def test_a_timestep_that_the_model_lacks_is_refused():
    with refuses(ValueError, "timestep 1000", "1000"):
        schedules.sigmas_of_timesteps([1000, 10], TABLE)


# ---- custom sigmas


@pytest.mark.parametrize("text", ["1, 0.5, 0", "1 0.5 0", " [1.0,0.5,0.0] ", "1,0.5,\n0"])
def test_custom_sigmas_may_be_written_in_any_usual_way(text):
    assert sigmas_for("custom", custom=text).tolist() == [1.0, 0.5, 0.0]


@pytest.mark.parametrize("text", ["", "one", "1, , 0.5x, 0", "1;0"])
def test_custom_sigmas_that_are_no_numbers_are_refused(text):
    with refuses(ValueError, f"custom sigmas {text!r}"):
        sigmas_for("custom", custom=text)


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("1, " * 10**5 + "x", "(300001 characters)"),
        (", ".join(["1"] * 10**5), "1001"),
        (", ".join(f"{1 - index / 2000}" for index in range(2001)), "1001"),
    ],
    ids=["not numbers", "equal", "falling"],
)
def test_long_custom_sigmas_are_refused_in_one_short_line(text, fact):
    with refuses(ValueError, "sigmas", fact) as error:
        sigmas_for("custom", custom=text)
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


def test_sigmas_of_many_levels_are_cut_in_texts():
    assert len(schedules.format_sigmas(torch.linspace(1, 0, 1001))) < 300


@pytest.mark.parametrize(
    ("text", "levels", "message"),
    [
        ("1, 0.5, 0.6, 0", FLOW, "must fall"),
        ("1, 0.5, 0.5, 0", FLOW, "must fall"),
        ("1, nan, 0", FLOW, "must fall"),
        ("1, 0.5", FLOW, "end at 0.5"),
        ("1, 0.5, -1", FLOW, "end at -1"),
        ("1.1, 0.5, 0", FLOW, "start above 1,"),
        ("inf, 0.5, 0", FLOW, "start above 1"),
        ("15, 1, 0", EPS, "start above 14.61"),
        ("0", FLOW, r"\[0\].* step"),
    ],
)
def test_sigmas_that_no_sampler_can_follow_are_refused(text, levels, message):
    with pytest.raises(ValueError, match=message):
        sigmas_for("custom", levels=levels, custom=text)


def test_the_noisiest_level_of_an_sdxl_may_be_written_with_five_digits():
    assert sigmas_for("custom", levels=EPS, custom="14.615, 4, 0")[0].item() == pytest.approx(14.615)


# ---- image to image


@pytest.mark.parametrize(("denoise", "first"), [(1.0, 1.0), (0.75, 0.75), (0.7, 0.75), (0.5, 0.5), (0.125, 0.25)])
def test_denoise_keeps_the_last_of_the_trained_levels(denoise, first):
    sigmas = schedules.last_steps(sigmas_for("auto", header=FLOW_STUDENT), denoise)
    assert sigmas[0] == first and sigmas[-1] == 0


@pytest.mark.parametrize(
    ("denoise", "message"),
    [
        (0.12, "denoise 0.12 .* 4 steps.* 0.125"),
        (0.0, "denoise 0 .* 4 steps"),
        (1.5, "denoise is 1.5"),
        (-1.0, "denoise is -1.0"),
        ("0.5", "denoise is 0.5"),
        (float("nan"), "denoise is nan"),
    ],
)
def test_a_denoise_that_leaves_no_step_is_refused(denoise, message):
    with pytest.raises(ValueError, match=message):
        schedules.last_steps(sigmas_for("auto", header=FLOW_STUDENT), denoise)
