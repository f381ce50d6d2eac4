"""Training of the embedded CLIP."""

import open_clip
import pytest
import torch

from dpdmd_pipeline.metrics.alignment import clip_score
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.scoring.sets import TensorSet
from dpdmd_pipeline.shapes.clip import full_captions, make_clip
from dpdmd_pipeline.shapes.world import NUM_MODES, captions, gallery
from dpdmd_pipeline.training.clip import clip_loss, retrieval, train_clip
from dpdmd_pipeline.training.teacher_recipe import ClipRecipe

RECIPE = ClipRecipe(steps=6, learning_rate=2e-3, batch_size=24, seed=0, noise=0.1, checkpoint_every=2)


def test_an_untrained_clip_is_at_chance_and_its_loss_is_that_of_guessing(tmp_path):
    model = make_clip(tmp_path, seed=0)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path}")
    tokens = tokenizer(full_captions()), tokenizer(captions())
    with torch.no_grad():
        model.logit_scale.fill_(-torch.inf)  # all captions are equally likely
    loss = clip_loss(model, *tokens, RECIPE, torch.Generator().manual_seed(0))
    expected = torch.tensor([24.0, 12.0]).log().sum()
    torch.testing.assert_close(loss, expected)
    shares = retrieval(make_clip(tmp_path, seed=0).eval(), tmp_path)
    assert shares["full_captions"] < 0.02 and shares["prompts"] < 0.3


def test_training_resumes_exactly_and_ends_in_a_folder_that_scores(tmp_path):
    class Killed(Exception):  # noqa: N818
        pass

    def run(name, until=None):
        losses = []

        def follow(total, records):
            assert total == 6
            for done, loss in records:
                losses.append(loss)
                if done == until:
                    raise Killed

        return train_clip(RECIPE, tmp_path / name, tmp_path / f"{name}_state", follow), losses

    whole, losses = run("whole")
    assert len(losses) == 6 and losses[-1] < losses[0]
    with pytest.raises(Killed):
        run("killed", until=3)
    again, rest = run("killed")
    assert rest == losses[2:]  # step 3 was made after the last checkpoint
    for one, two in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    images = TensorSet("p", "p", (gallery()[: 2 * NUM_MODES : NUM_MODES] * 255).byte()).load().images
    scores = clip_score(tmp_path / "killed", Passes("cpu", 1))(captions()[0], images)
    assert scores.shape == (2,) and (scores >= 0).all() and (scores <= 100).all()
