"""Anchors of the teacher, online and from a cache."""

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import ANCHOR_STEPS, GUIDANCE, NUM_STEPS, InMemory

from dpdmd_pipeline.backbones.base import guided
from dpdmd_pipeline.dpdmd.anchor import teacher_anchors
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, rollout
from dpdmd_pipeline.training.anchors import CachedAnchors, OnlineAnchors


def test_anchors_lie_on_the_guided_teachers_path(backbone, embeddings, ask_teacher):
    tensors = ask_teacher([0, 2], [11, 12])
    noise = noise_from_seeds([11, 12], backbone.latent_shape)
    teacher = guided(backbone, ask_teacher.teacher, embeddings.rows([0, 2]), embeddings.rows([3]), GUIDANCE)
    levels = backbone.schedule(NUM_STEPS)
    with torch.no_grad():
        for number, steps in enumerate(ANCHOR_STEPS):
            anchor = rollout(teacher, noise, levels[: steps + 1])
            torch.testing.assert_close(tensors[f"anchor_{number}"], anchor)
            torch.testing.assert_close(tensors[f"denoised_{number}"], teacher(anchor, levels[steps]))


def test_a_sample_has_the_same_anchor_in_every_batch(ask_teacher):
    together = ask_teacher([0, 1, 2], [5, 6, 7])["anchor_1"]
    alone = torch.cat(
        [ask_teacher([prompt], [seed])["anchor_1"] for prompt, seed in zip([0, 1, 2], [5, 6, 7], strict=True)]
    )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("steps", [[], [0], [2, 2], [3, 1], [NUM_STEPS], [2, 99]])
def test_anchor_steps_that_do_not_rise_or_reach_the_end_are_refused(backbone, steps):
    with refuses(ValueError, f"{steps}", f"{NUM_STEPS}"):
        teacher_anchors(lambda latents, level: latents, torch.zeros(1, 16, 8, 8), backbone.schedule(NUM_STEPS), steps)


def test_online_and_cached_anchors_of_the_same_samples_are_equal(backbone, ask_teacher):
    online = OnlineAnchors(ask_teacher, [0, 1, 2], seed=0, anchored_steps=2)(5, range(4))
    seeds = [1, 2, 3, 4]
    cache = InMemory(
        {"prompt": torch.tensor(online.prompts), "seed": torch.tensor(seeds), **ask_teacher(online.prompts, seeds)}
    )
    batch = CachedAnchors(cache, backbone.latent_shape, seed=0, batch_size=4, anchored_steps=2)(0, range(4))
    fresh = ask_teacher(batch.prompts, [seeds[online.prompts.index(p)] for p in batch.prompts])
    assert sorted(batch.prompts) == sorted(online.prompts) and len(batch.anchors) == len(batch.denoised) == 2
    assert batch.noise.shape == online.noise.shape == batch.anchors[0].shape == fresh["anchor_0"].shape


def test_a_cache_is_used_up_before_anything_repeats(backbone):
    rows = 7
    cache = InMemory(
        {"prompt": torch.arange(rows), "seed": torch.arange(rows), "anchor_0": torch.zeros(rows, 16, 8, 8)}
    )
    draw = CachedAnchors(cache, backbone.latent_shape, seed=1, batch_size=3, anchored_steps=1)
    drawn = [prompt for step in range(7) for prompt in draw(step, range(3)).prompts]
    epochs = [drawn[start : start + rows] for start in range(0, 21, rows)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert draw(4, range(3)).prompts == drawn[12:15]  # any cycle can be drawn again, as a resumed run does
    torch.testing.assert_close(draw(0, range(3)).noise, noise_from_seeds(drawn[:3], backbone.latent_shape))
