import torch
from torch import nn

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.shapes.world import captions
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.recipe import FitRecipe, TeacherRecipe
from dpdmd_pipeline.training.teacher import fit, posterior_mean, train_teacher


def test_the_exact_denoiser_is_the_posterior_mean():
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(5, 2, 3, 3, generator=generator)
    noisy = torch.randn(4, 2, 3, 3, generator=generator)
    sigma = torch.tensor([0.3, 0.6, 0.9, 1.0])
    allowed = torch.tensor(
        [[True] * 5, [True, True, False, False, True], [False, False, False, True, False], [True] * 5]
    )
    for row in range(4):
        residual = (noisy[row] - (1 - sigma[row]) * pictures).flatten(1).square().sum(1)
        weights = torch.exp(-residual.double() / (2 * sigma[row].double() ** 2)) * allowed[row]
        expected = (weights[:, None, None, None] * pictures).sum(0) / weights.sum()
        found = posterior_mean(noisy, sigma, pictures, allowed)[row]
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)


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


def test_a_teacher_trained_for_three_steps_is_a_teacher_folder(tmp_path):
    recipe = TeacherRecipe(
        seed=0,
        max_length=12,
        shift=1.0,
        prompt_dropout=0.1,
        text_encoders={"steps": 3, "learning_rate": 1e-3},
        vae={"steps": 3, "batch_size": 4, "learning_rate": 1e-3},
        transformer={"steps": 3, "batch_size": 4, "learning_rate": 1e-3},
        checkpoint_every=2,
    )
    followed = {}

    def follow(name, total, records):
        followed[name] = [done for done, _ in records]

    pipeline = train_teacher(recipe, tmp_path / "state", follow)
    names = ["text_encoder", "text_encoder_2", "vae", "transformer"]
    assert followed == dict.fromkeys(names, [1, 2, 3])
    pipeline.save_pretrained(tmp_path / "teacher")
    backbone = load_backbone(
        "sd3", tmp_path / "teacher", resolution=32, max_sequence_length=0, level_range=(0.02, 0.98)
    )
    assert backbone.encode(captions()[:2])["prompt_embeds"].shape == (2, 12, 64)

    again = train_teacher(recipe, tmp_path / "state", follow)
    assert followed == dict.fromkeys(names, [])  # nothing is trained twice
    for one, two in zip(pipeline.transformer.parameters(), again.transformer.parameters(), strict=True):
        assert torch.equal(one, two)
