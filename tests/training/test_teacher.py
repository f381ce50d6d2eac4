"""Training of the embedded teachers: the exact denoiser, resume, and the folders they end in."""

import shutil

import pytest
import torch
from torch import nn

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.dpdmd.noise import flow_level, vp_level
from dpdmd_pipeline.shapes.models import make_diffusion_scheduler
from dpdmd_pipeline.shapes.world import NUM_MODES, NUM_PROMPTS, captions
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.teacher import (
    DenoisingData,
    draw_examples,
    encode_gallery,
    fit,
    posterior_mean,
    train_teacher,
    unet_loss,
)
from dpdmd_pipeline.training.teacher_recipe import FitRecipe, TeacherRecipe

ALPHAS_CUMPROD = make_diffusion_scheduler().alphas_cumprod
FITTED = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3}
RECIPE = {
    "seed": 0,
    "max_length": 12,
    "prompt_dropout": 0.1,
    "text_encoders": {"steps": 3, "learning_rate": 1e-3},
    "vae": FITTED,
    "decoder": {**FITTED, "noise": 0.2},
    "checkpoint_every": 2,
}
SD3 = {"shift": 1.0, "transformer": FITTED}
SDXL = {"shift": None, "unet": FITTED}


@pytest.mark.parametrize(
    "level",
    [
        flow_level(torch.tensor([0.3, 0.6, 0.9, 1.0]).view(-1, 1, 1, 1)),
        vp_level(torch.tensor([100, 400, 800, 999]).view(-1, 1, 1, 1), ALPHAS_CUMPROD),
    ],
    ids=["flow", "vp"],
)
def test_the_exact_denoiser_is_the_posterior_mean(level):
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(5, 2, 3, 3, generator=generator)
    noisy = torch.randn(4, 2, 3, 3, generator=generator)
    alpha, sigma = level.alpha.flatten(), level.sigma.flatten()
    allowed = torch.tensor(
        [[True] * 5, [True, True, False, False, True], [False, False, False, True, False], [True] * 5]
    )
    for row in range(4):
        residual = (noisy[row] - alpha[row] * pictures).flatten(1).square().sum(1)
        weights = torch.exp(-residual.double() / (2 * sigma[row].double() ** 2)) * allowed[row]
        expected = (weights[:, None, None, None] * pictures).sum(0) / weights.sum()
        mean = posterior_mean(noisy, level, pictures, allowed)[row]
        torch.testing.assert_close(mean, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_fit_resumes_exactly(tmp_path):
    def run(folder, steps_before_a_kill=None):
        torch.manual_seed(0)
        model = nn.Linear(3, 3)

        def loss_at(generator):
            return (model(torch.randn(4, 3, generator=generator)) - 1).square().mean()

        recipe = FitRecipe(steps=10, learning_rate=0.1)
        records = fit(model, loss_at, recipe, seed=0, checkpoints=Checkpoints(folder), checkpoint_every=3)
        for done, _ in records:
            if done == steps_before_a_kill:
                break
        return model.weight.detach().clone()

    whole = run(tmp_path / "whole")
    run(tmp_path / "killed", steps_before_a_kill=7)
    assert torch.equal(run(tmp_path / "killed"), whole)


@pytest.mark.parametrize(
    ("family", "parts", "network", "pooled"), [("sd3", SD3, "transformer", 64), ("sdxl", SDXL, "unet", 32)]
)
def test_a_teacher_trained_for_three_steps_is_a_teacher_folder(tmp_path, family, parts, network, pooled):
    recipe = TeacherRecipe(**RECIPE, **parts)
    assert recipe.family == family
    followed = {}

    def follow(name, total, records):
        followed[name] = [done for done, _ in records]

    pipeline = train_teacher(recipe, tmp_path / "state", follow)
    names = ["text_encoder", "text_encoder_2", "vae", "decoder", network]
    assert followed == dict.fromkeys(names, [1, 2, 3])
    pipeline.save_pretrained(tmp_path / "teacher")
    backbone = load_backbone(
        family, tmp_path / "teacher", resolution=32, max_sequence_length=0, level_range=(0.02, 0.98)
    )
    cond = backbone.encode(captions()[:2])
    assert cond["prompt_embeds"].shape == (2, 12, 64) and cond["pooled_embeds"].shape == (2, pooled)

    again = train_teacher(recipe, tmp_path / "state", follow)
    assert followed == dict.fromkeys(names, [])  # nothing is trained twice
    for one, two in zip(getattr(pipeline, network).parameters(), getattr(again, network).parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_decoder_is_trained_alone(tmp_path):
    """The latents of all pictures stay the same, and so do the denoising network and every cache."""

    def autoencoder(**changes):
        recipe = TeacherRecipe(**{**RECIPE, **SD3, **changes})
        return train_teacher(recipe, tmp_path / "state", lambda name, total, records: list(records)).vae.state_dict()

    once = autoencoder()
    shutil.rmtree(tmp_path / "state" / "decoder")
    again = autoencoder(decoder={**FITTED, "steps": 1, "noise": 0.2})
    changed = {name.split(".")[0] for name, value in once.items() if not torch.equal(value, again[name])}
    assert changed == {"decoder"}


# ---- training data of the denoising networks


@pytest.fixture(scope="module")
def data():
    """Random latents instead of a trained autoencoder's."""
    generator = torch.Generator().manual_seed(0)
    rows = len(captions()) + 1
    return DenoisingData(
        torch.randn(NUM_PROMPTS * NUM_MODES, 4, 8, 8, generator=generator),
        torch.randn(rows, 12, 64, generator=generator),
        torch.randn(rows, 32, generator=generator),
    )


def test_examples_are_noisy_pictures_of_their_captions(data):
    def nearly_clean(uniform):
        return vp_level(torch.zeros_like(uniform).long(), ALPHAS_CUMPROD)

    noisy, level, x0, row = draw_examples(data, nearly_clean, torch.Generator().manual_seed(0), 64, 0.5)
    distance = (noisy[:, None] / level.alpha[:, None] - data.pictures).flatten(2).square().sum(2)
    nearest = distance.argmin(1)
    torch.testing.assert_close(x0, data.pictures[nearest], rtol=1e-3, atol=1e-3)  # so little noise hides nothing
    empty = row == len(captions())
    assert 16 < empty.sum() < 48
    assert torch.equal((nearest // NUM_MODES)[~empty], (row % NUM_PROMPTS)[~empty])


def test_a_unet_that_knows_the_posterior_mean_has_no_loss(data):
    """The loss is that of the v-prediction: the square of x0's error over sigma."""
    arguments = {}

    class Exact(nn.Module):
        def __init__(self, error):
            super().__init__()
            self.error = error

        def forward(self, noisy, timestep, *, encoder_hidden_states, added_cond_kwargs):
            level = vp_level(timestep.view(-1, 1, 1, 1), ALPHAS_CUMPROD)
            arguments.update(noisy=noisy, level=level, cond=encoder_hidden_states, **added_cond_kwargs)
            x0 = posterior_mean(noisy, level, data.pictures, allowed(data, encoder_hidden_states)) + self.error
            return type("Output", (), {"sample": (noisy - level.alpha * x0) / level.sigma})

    def loss(error):
        return unet_loss(Exact(error), ALPHAS_CUMPROD, data, torch.Generator().manual_seed(1), 16, 0.3)

    assert loss(0.0) < 1e-8
    torch.testing.assert_close(loss(0.1), (0.1 / arguments["level"].sigma).square().mean(), rtol=1e-3, atol=0)
    assert arguments["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]] * 16
    assert arguments["level"].timestep.max() > 500


def allowed(data, embeds):
    """[B, M] bool: the pictures that each embedded caption permits, looked up by its embedding."""
    row = (embeds[:, None] - data.prompt_embeds).flatten(2).square().sum(2).argmin(1)
    owner = torch.arange(len(data.pictures)) // NUM_MODES
    return (row == len(captions()))[:, None] | (owner == (row % NUM_PROMPTS)[:, None])


def test_the_gallerys_latents_have_variance_1_and_those_of_sd3_are_centred():
    from dpdmd_pipeline.shapes.models import make_sdxl_vae, make_vae

    for vae, centred in ((make_vae(), True), (make_sdxl_vae(), False)):
        latents = encode_gallery(vae)
        assert latents.std().item() == pytest.approx(1, abs=1e-3)
        assert (vae.config.shift_factor is not None) == centred == (abs(latents.mean().item()) < 1e-3)


# ---- recipes


@pytest.mark.parametrize(
    ("parts", "facts"),
    [
        ({"shift": 1.0}, "transformer.*unet"),
        ({"shift": 1.0, "transformer": FITTED, "unet": FITTED}, "transformer.*unet"),
        ({"shift": None, "transformer": FITTED}, "shift=None.*transformer"),
        ({"shift": 3.0, "unet": FITTED}, "shift=3.0.*unet"),
        ({"unet": FITTED}, "shift"),
    ],
)
def test_a_recipe_is_of_one_family(parts, facts):
    with pytest.raises(ValueError, match=facts):
        TeacherRecipe(**RECIPE, **parts)
