"""Our loop equals the published one, which uses velocities and diffusers' sampler, from the same draws."""

import pytest
import torch
from benchmarks.reference_recipe import Draw, PublishedLoop, PublishedSettings
from tests.training.conftest import (  # noqa: F401
    ANCHOR_STEPS,
    GUIDANCE,
    NUM_STEPS,
    OPTIMIZER,
    RECIPE,
    ask_teacher,
    backbone,
    embeddings,
    start,
)

from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, sample_seeds, uniform_from_seeds
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import make_roles

PROMPTS = ["a red circle", "a blue square", "a green triangle"]
CYCLES = 3
# The published loop's fixed choices, and its sampler from diffusers
AS_PUBLISHED = {"grid": "diffusers", "max_steps": CYCLES, "decay": 0.0, "diversity_weight": 0.5}


@pytest.fixture
def published(backbone, tmp_path):  # noqa: F811
    roles = make_roles(backbone, Recipe(**{**RECIPE, **AS_PUBLISHED}), gradient_checkpointing=False, sharded=False)
    settings = PublishedSettings(
        prompts=PROMPTS,
        batch_size=RECIPE["batch_size"],
        num_steps=RECIPE["num_steps"],
        teacher_steps=NUM_STEPS,
        anchor_steps=ANCHOR_STEPS[0],
        guidance_scale=GUIDANCE,
        diversity_weight=AS_PUBLISHED["diversity_weight"],
        fake_score_updates=RECIPE["fake_score_turns"],
        learning_rate=OPTIMIZER["learning_rate"],
        max_grad_norm=OPTIMIZER["max_grad_norm"],
        pictures_every=2,
        pictures=tmp_path,
    )
    return PublishedLoop(backbone, roles.teacher, roles.student, roles.fake_score, settings)


def our_draw(family, stream: str, update: int) -> Draw:
    """The random inputs of our loop's update."""
    seeds = {
        purpose: sample_seeds(RECIPE["seed"], f"{stream}/{purpose}", update, RECIPE["batch_size"])
        for purpose in ("prompt", "noise", "renoise", "level")
    }
    noise, renoise = (noise_from_seeds(seeds[purpose], family.latent_shape) for purpose in ("noise", "renoise"))
    sigma = family.random_level(uniform_from_seeds(seeds["level"])).sigma
    return Draw([PROMPTS[seed % len(PROMPTS)] for seed in seeds["prompt"]], noise, renoise, sigma)


def test_from_the_same_draws_both_loops_have_the_same_losses_and_students(
    start,  # noqa: F811
    backbone,  # noqa: F811
    published,
    tmp_path,
):
    roles, records = start(tmp_path / "ours", **AS_PUBLISHED)
    updates = RECIPE["fake_score_turns"]
    for cycle, record in enumerate(records):
        first = cycle * updates
        fake = [
            published.update_fake_score(our_draw(backbone, "fake_score", update))
            for update in range(first, first + updates)
        ]
        theirs = published.update_student(our_draw(backbone, "student", cycle))
        theirs["fake_score_loss"] = sum(fake) / updates
        assert {name: record[name] for name in theirs} == pytest.approx(theirs, rel=2e-3)
    for ours, theirs in ((roles.student, published.student), (roles.fake_score, published.fake_score)):
        weights = [torch.cat([p.detach().flatten() for p in network.parameters()]) for network in (ours, theirs)]
        torch.testing.assert_close(*weights, rtol=0, atol=2e-4)  # a fifth of one update


def test_its_own_draws_make_pictures_in_every_second_update(published, tmp_path):
    losses = [published.cycle() for _ in range(2)]
    assert all(torch.tensor(list(row.values())).isfinite().all() for row in losses)
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000002_0.png", "000002_1.png"]
