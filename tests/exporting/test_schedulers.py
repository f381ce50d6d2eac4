"""Stock schedulers at trained levels."""

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.dpdmd.noise import flow_sigmas, vp_schedule
from dpdmd_pipeline.exporting.schedulers import trained_schedule

SANA = {"prediction_type": "flow_prediction", "flow_shift": 3.0}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def reloaded(schedule, folder):
    """The scheduler after a round trip through its folder."""
    schedule.scheduler.save_pretrained(folder)
    return type(schedule.scheduler).from_pretrained(folder)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("grid", ["diffusers", "shifted"])
def test_the_number_of_steps_alone_gives_every_named_grid(tmp_path, grid, shift, num_steps):
    sigmas = flow_sigmas(num_steps, shift, grid)
    scheduler = reloaded(trained_schedule(StudentHeader("sd3", sigmas.tolist()), {"shift": shift}), tmp_path)
    scheduler.set_timesteps(num_steps)
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(scheduler.timesteps, 1000 * sigmas[:-1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("shifts_end_points", ["as installed", "once", "twice"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 5.0])
@pytest.mark.parametrize("grid", ["diffusers", "shifted"])
def test_the_sigmas_of_the_call_give_the_levels_under_every_version_of_diffusers(
    tmp_path, grid, shift, num_steps, shifts_end_points
):
    sigmas = flow_sigmas(num_steps, shift, grid)
    schedule = trained_schedule(StudentHeader("sd3", sigmas.tolist()), {"shift": shift})
    scheduler = reloaded(schedule, tmp_path)
    if shifts_end_points != "as installed":  # once: both end points are those before the shift
        scheduler.sigma_min, scheduler.sigma_max = 0.001, 1.0
    if shifts_end_points == "twice":
        scheduler.sigma_min = 0.001 * scheduler.shift / (1 + (scheduler.shift - 1) * 0.001)
    scheduler.set_timesteps(**schedule.arguments)
    torch.testing.assert_close(scheduler.sigmas, sigmas, rtol=0, atol=2e-7)
    torch.testing.assert_close(scheduler.timesteps, 1000 * sigmas[:-1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("sigmas", [[1.0, 0.9, 0.6, 0.2, 0.0], [0.9, 0.4, 0.0], [0.9, 0.0]])
def test_levels_that_no_stock_scheduler_has_are_arguments_of_the_call(tmp_path, sigmas):
    schedule = trained_schedule(StudentHeader("sd3", sigmas), {"shift": 3.0})
    assert schedule.arguments == {"sigmas": sigmas[:-1]}
    scheduler = reloaded(schedule, tmp_path)
    scheduler.set_timesteps(**schedule.arguments)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(sigmas), rtol=0, atol=1e-7)


def test_sanas_name_of_the_shift_is_read_and_a_dynamic_shift_is_refused():
    header = StudentHeader("sana", flow_sigmas(4, 3.0, "diffusers").tolist())
    assert trained_schedule(header, SANA).scheduler.config.shift == 3.0
    for config in ({"shift": 3.0, "use_dynamic_shifting": True}, {}):
        with refuses(ValueError, "shift"):
            trained_schedule(header, config)


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5])
def test_the_number_of_steps_alone_gives_trailing_timesteps(tmp_path, sampler, num_steps):
    from diffusers import DDIMScheduler

    trailing = vp_schedule(num_steps, DDIMScheduler(**BETAS).alphas_cumprod).timestep[:-1].tolist()
    header = StudentHeader("sdxl", prediction="eps", timesteps=trailing, sampler=sampler)
    schedule = trained_schedule(header, BETAS | {"use_karras_sigmas": True, "steps_offset": 1})
    assert schedule.arguments == {}
    scheduler = reloaded(schedule, tmp_path)
    scheduler.set_timesteps(num_steps)
    assert scheduler.timesteps.tolist() == trailing
    assert scheduler.init_noise_sigma == 1  # starts from unit variance


@pytest.mark.parametrize("sampler", ["euler", "renoise"])
def test_other_timesteps_are_arguments_of_the_call(tmp_path, sampler):
    header = StudentHeader("sdxl", prediction="v", timesteps=[999, 500, 100], sampler=sampler)
    schedule = trained_schedule(header, BETAS)
    assert schedule.arguments == {"timesteps": [999, 500, 100]}
    scheduler = reloaded(schedule, tmp_path)
    scheduler.set_timesteps(**schedule.arguments)
    assert scheduler.timesteps.tolist() == [999, 500, 100] and scheduler.config.prediction_type == "v_prediction"


def test_uneven_timesteps_of_a_zero_terminal_snr_model_are_refused():
    header = StudentHeader("sdxl", prediction="v", timesteps=[999, 500, 100])
    with refuses(ValueError, "[999, 500, 100]", "rescale_betas_zero_snr"):
        trained_schedule(header, BETAS | {"rescale_betas_zero_snr": True})
