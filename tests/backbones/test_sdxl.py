"""Special to SDXL: timesteps, eps and v-prediction, sizes as a conditioning, zeros for the empty prompt."""

import shutil

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.backbones.sdxl import SDXL, load
from dpdmd_pipeline.dpdmd.noise import add_noise, x0_from_eps, x0_from_v_prediction

OPTIONS = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98)}
PROMPTS = ["a red circle", "something that no caption says: naïve 日本 " * 5]
SCHEDULER = "scheduler/scheduler_config.json"


@pytest.fixture(scope="module")
def backbone(tiny_sdxl):
    return SDXL(tiny_sdxl, **OPTIONS)


@pytest.fixture(scope="module")
def model(backbone):
    return backbone.load_model().eval().requires_grad_(False)


def load_pipeline(folder):
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(count=2, seed=0):
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- text


def test_prompts_are_encoded_as_by_the_pipeline(tiny_sdxl, backbone):
    cond = backbone.encode(PROMPTS)
    with torch.no_grad():
        embeds, _, pooled, _ = load_pipeline(tiny_sdxl).encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert cond["prompt_embeds"].shape == (2, 12, 64) and cond["pooled_embeds"].shape == (2, 32)
    assert torch.equal(cond["prompt_embeds"], embeds) and torch.equal(cond["pooled_embeds"], pooled)


def test_the_empty_prompt_is_the_pipelines_unconditional_branch(tiny_sdxl, edited):
    for forced in (True, False):
        folder = edited(tiny_sdxl, "model_index.json", force_zeros_for_empty_prompt=forced)
        cond = SDXL(folder, **OPTIONS).encode(["a red circle", ""])
        with torch.no_grad():
            _, embeds, _, pooled = load_pipeline(folder).encode_prompt(PROMPTS[0], do_classifier_free_guidance=True)
        torch.testing.assert_close(cond["prompt_embeds"][1:], embeds, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(cond["pooled_embeds"][1:], pooled, rtol=1e-5, atol=1e-5)
        assert (cond["prompt_embeds"][1].abs().sum() == 0) == forced
        assert bool((cond["prompt_embeds"][0] != 0).any())


def test_encoding_reads_neither_the_unets_weights_nor_the_autoencoders(tiny_sdxl, backbone, tmp_path):
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sdxl, folder)
    for component in ("unet", "vae"):
        for weights in (folder / component).glob("*.safetensors"):
            weights.unlink()
    complete, textual = backbone.encode(PROMPTS), SDXL(folder, **OPTIONS).encode(PROMPTS)
    assert all(torch.equal(complete[name], textual[name]) for name in complete)


# ---- levels


@pytest.mark.parametrize("num_steps", [1, 4, 7, 25, 50])
def test_the_schedule_is_that_of_the_trailing_ddim_sampler(tiny_sdxl, backbone, num_steps):
    scheduler = load_pipeline(tiny_sdxl).scheduler
    scheduler.set_timesteps(num_steps)
    levels = backbone.schedule(num_steps)
    assert levels.timestep[:-1].tolist() == scheduler.timesteps.tolist() and levels.timestep[0] == 999
    torch.testing.assert_close(levels.alpha[:-1], scheduler.alphas_cumprod[scheduler.timesteps].sqrt())
    torch.testing.assert_close(levels.alpha**2 + levels.sigma**2, torch.ones(num_steps + 1))


def test_the_levels_follow_from_the_betas_whatever_the_scheduler(tiny_sdxl, backbone, tmp_path):
    from diffusers import EulerDiscreteScheduler

    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sdxl, folder)
    # the published config of SDXL
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    published = SDXL(folder, **OPTIONS)
    assert torch.equal(published.alphas_cumprod, backbone.alphas_cumprod) and published.prediction == "eps"
    assert torch.equal(published.schedule(50).timestep, backbone.schedule(50).timestep)
    sigmas = published.schedule(4)[:-1].sigma / published.schedule(4)[:-1].alpha
    torch.testing.assert_close(sigmas, torch.tensor([14.614647, 4.081731, 1.612887, 0.693205]), rtol=1e-5, atol=0)


def test_a_student_has_the_trailing_grid_or_its_own_timesteps(backbone):
    trailing = backbone.student_schedule("trailing", 4)
    assert trailing.timestep.tolist() == [999, 749, 499, 249, 0]
    for grid in ([999, 749, 499, 249], [999.0, 749.0, 499.0, 249.0]):  # a recipe may have floats
        own = backbone.student_schedule(grid, 4)
        assert all(torch.equal(*pair) for pair in zip(vars(own).values(), vars(trailing).values(), strict=True))
        assert own.timestep.dtype == torch.int64 and own.sigma[-1] == 0
    published = backbone.student_schedule([999, 759, 499, 259], 4)
    assert published.sigma[1] == (1 - backbone.alphas_cumprod[759]).sqrt()


@pytest.mark.parametrize(
    ("grid", "fact"),
    [
        ("shifted", "'shifted'.*trailing"),
        ([999, 499], "2 .*num_steps=4"),
        ([999, 749, 749, 249], "749, 749.*999"),
        ([999, 749.5, 499, 249], "749.5"),
        ([1000, 749, 499, 249], "1000.*999"),
        ([1.0, 0.75, 0.5, 0.25], "0.75"),
    ],
)
def test_a_grid_that_has_no_valid_timesteps_is_refused(backbone, grid, fact):
    with pytest.raises(ValueError, match=fact):
        backbone.student_schedule(grid, 4)


def test_random_levels_fill_their_share_of_the_timesteps(tiny_sdxl, backbone):
    timestep = backbone.random_level(torch.linspace(0, 1 - 1e-6, 1001)).timestep.flatten()
    assert timestep.dtype == torch.int64 and (timestep[0], timestep[-1]) == (20, 979)
    assert set(timestep.tolist()) == set(range(20, 980))
    whole = SDXL(tiny_sdxl, **OPTIONS | {"level_range": (0.02, 1.0)})
    assert whole.random_level(torch.tensor([1 - 2**-24])).timestep.item() == 999


# ---- network


@pytest.mark.parametrize(
    ("folder", "prediction", "to_x0"),
    [("tiny_sdxl", "eps", x0_from_eps), ("tiny_sdxl_v", "v", x0_from_v_prediction)],
)
def test_x0_follows_from_the_prediction(folder, prediction, to_x0, request):
    backbone = SDXL(request.getfixturevalue(folder), **OPTIONS)
    assert backbone.prediction == prediction
    model, cond, level = (
        backbone.load_model(),
        backbone.encode(PROMPTS),
        backbone.random_level(torch.tensor([0.9, 0.2])),
    )
    with torch.no_grad():
        output = model(
            noise(),
            level.timestep.flatten(),
            encoder_hidden_states=cond["prompt_embeds"],
            added_cond_kwargs={
                "text_embeds": cond["pooled_embeds"],
                "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 2),
            },
            return_dict=False,
        )[0]
        x0 = backbone.denoise(model, noise(), level, cond)
    torch.testing.assert_close(x0, to_x0(noise(), output, level))


def test_the_exact_prediction_gives_x0(tiny_sdxl, tiny_sdxl_v):
    x0, fresh = noise(seed=1), noise(seed=2)
    for folder in (tiny_sdxl, tiny_sdxl_v):
        backbone = SDXL(folder, **OPTIONS)
        level = backbone.random_level(torch.tensor([0.9, 0.2]))
        exact = {"eps": fresh, "v": level.alpha * fresh - level.sigma * x0}[backbone.prediction]

        class Oracle(torch.nn.Module):
            def forward(self, *args, exact=exact, **kwargs):
                return type("Output", (), {"sample": exact})

        denoised = backbone.denoise(Oracle(), add_noise(x0, fresh, level), level, backbone.encode(PROMPTS))
        torch.testing.assert_close(denoised, x0, rtol=1e-4, atol=1e-4)


def test_the_size_of_the_picture_is_a_conditioning(tiny_sdxl, backbone, model):
    wide, sizes = backbone.at((16, 64)), []
    assert wide.latent_shape == (4, 4, 16)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(kwargs["added_cond_kwargs"]["time_ids"]), with_kwargs=True
    )
    with hook, torch.no_grad():
        latents = torch.zeros(1, *wide.latent_shape)
        wide.denoise(model, latents, wide.schedule(4)[1], backbone.encode(PROMPTS[:1]))
    assert sizes[0].tolist() == [[16, 64, 0, 0, 16, 64]]


def test_a_network_in_half_precision_still_gives_x0_in_float32(tiny_sdxl, backbone, model):
    half = SDXL(tiny_sdxl, **OPTIONS, dtype=torch.bfloat16)
    cond, level = backbone.encode(PROMPTS), backbone.schedule(4)[2]
    network = half.load_model()
    assert next(network.parameters()).dtype == torch.bfloat16
    assert next(half.load_model(float32=True).parameters()).dtype == torch.float32
    with torch.no_grad():
        ours, exact = half.denoise(network, noise(), level, cond), backbone.denoise(model, noise(), level, cond)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() / (exact - noise()).norm() < 0.05


# ---- pictures


def test_latents_with_their_own_mean_and_spread_are_decoded_as_by_the_pipeline(tiny_sdxl, edited):
    statistics = {"latents_mean": [-1.6, 1.2, -0.4, 0.3], "latents_std": [8.4, 5.9, 5.2, 6.0], "scaling_factor": 0.5}
    folder = edited(tiny_sdxl, "vae/config.json", **statistics)
    call = {"num_inference_steps": 2, "guidance_scale": 1.0, "height": 32, "width": 32}
    drawn, expected = (
        load_pipeline(folder)(PROMPTS, latents=noise(), output_type=kind, **call).images for kind in ("latent", "pt")
    )
    torch.testing.assert_close(SDXL(folder, **OPTIONS).decode(drawn), expected, rtol=1e-5, atol=1e-5)


def test_the_autoencoder_runs_in_float32_whatever_the_networks_precision(tiny_sdxl):
    half = SDXL(tiny_sdxl, **OPTIONS, dtype=torch.float16)
    assert torch.equal(half.decode(noise()), SDXL(tiny_sdxl, **OPTIONS).decode(noise()))


# ---- refusals


@pytest.mark.parametrize(
    ("file", "values", "fact"),
    [
        (SCHEDULER, {"prediction_type": "sample"}, "'sample'.*epsilon.*v_prediction"),
        (SCHEDULER, {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*'epsilon'"),
        ("unet/config.json", {"addition_embed_type": None}, "addition_embed_type None"),
        ("unet/config.json", {"in_channels": 9}, "9 to 4 channels"),
    ],
)
def test_a_folder_of_another_kind_is_refused(tiny_sdxl, edited, file, values, fact):
    with pytest.raises(ValueError, match=fact):
        SDXL(edited(tiny_sdxl, file, **values), **OPTIONS)


def test_zero_terminal_snr_is_read_with_v_prediction(tiny_sdxl_v, edited):
    backbone = SDXL(edited(tiny_sdxl_v, SCHEDULER, rescale_betas_zero_snr=True), **OPTIONS)
    first = backbone.schedule(4)[0]
    assert (first.alpha, first.sigma) == (0, 1)
    with torch.no_grad():
        x0 = backbone.denoise(backbone.load_model(), noise(), first, backbone.encode(PROMPTS))
    assert bool(x0.isfinite().all())


def test_a_flow_scheduler_is_refused(tiny_sdxl, tmp_path):
    from diffusers import FlowMatchEulerDiscreteScheduler

    folder = tmp_path / "teacher"
    shutil.copytree(tiny_sdxl, folder)
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    with refuses(ValueError, "beta_start,"):
        SDXL(folder, **OPTIONS)


@pytest.mark.parametrize("options", [{"resolution": 30}, {"max_sequence_length": 77}])
def test_options_that_do_not_fit_are_refused(tiny_sdxl, options):
    (name,) = options
    with pytest.raises(ValueError, match=rf"backbone.{name} (is )?{options[name]}"):
        load(tiny_sdxl, **OPTIONS | options)
