from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import ValidationError
from tests.pipelines.conftest import (
    PROMPTS,
    TWO,
    anchor_options,
    backbone_options,
    cached,
    contents,
    shared_by_two,
    train_options,
)
from tests.raising import refuses

from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors, make_manifest


@pytest.fixture
def make(tiny_teacher, embeddings, tmp_path):
    """Make a cache with some options changed."""

    def make_cache(backbone=None, **changes):
        shards = make_anchors(
            PROMPTS,
            embeddings,
            tiny_teacher,
            backbone or backbone_options(),
            anchor_options(**changes),
            train_options(),
        )
        return cached(tmp_path / "anchors", shared_by_two(shards) if shards.launch else shards)

    return make_cache


def test_every_training_prompt_has_equally_many_anchors_with_seeds_of_its_own(anchors):
    rows = anchors.rows(range(len(anchors)))
    assert rows["prompt"].tolist() == [0, 1] * 5  # the third is for evaluation only
    assert len(set(rows["seed"].tolist())) == 10
    assert rows["anchor_0"].shape == (10, 16, 8, 8) and rows["anchor_0"].dtype == torch.float32


def test_an_anchor_equals_the_latents_of_the_guided_teacher_in_diffusers(anchors, tiny_teacher, embeddings):
    backbone = backbone_options().load(tiny_teacher, "cpu")
    model, scheduler = (
        backbone.load_model().eval(),
        FlowMatchEulerDiscreteScheduler.from_pretrained(tiny_teacher, subfolder="scheduler"),
    )
    row = anchors.rows([3])
    latents = torch.randn(16, 8, 8, generator=torch.Generator().manual_seed(row["seed"].item()))[None]
    text = embeddings.rows([row["prompt"].item(), len(PROMPTS)])
    scheduler.set_timesteps(6)
    with torch.no_grad():
        for timestep in scheduler.timesteps[:2]:
            cond, uncond = model(
                hidden_states=torch.cat([latents] * 2),
                timestep=timestep.expand(2),
                encoder_hidden_states=text["prompt_embeds"],
                pooled_projections=text["pooled_embeds"],
            ).sample.chunk(2)
            latents = scheduler.step(uncond + 3.5 * (cond - uncond), timestep, latents).prev_sample
    torch.testing.assert_close(row["anchor_0"], latents, rtol=1e-4, atol=1e-5)


def test_a_level_by_its_sigma_is_the_nearest_of_the_teacher(make):
    by_steps = make(anchor_levels=[{"steps": 2}, {"steps": 4}])
    sigmas = by_steps.manifest["anchor_sigmas"]
    assert sigmas == [by_steps.manifest["teacher_sigmas"][steps] for steps in (2, 4)]
    rows = by_steps.rows(range(len(by_steps)))
    by_sigma = make(anchor_levels=[{"sigma": sigma + 0.01} for sigma in sigmas])
    assert by_sigma.manifest["anchor_steps"] == [2, 4]
    for name, tensor in by_sigma.rows(range(len(by_sigma))).items():
        assert torch.equal(tensor, rows[name])


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 3}, {"shard_size": 10}])
def test_batching_does_not_change_the_samples(anchors, make, changes):
    for name, tensor in make(**changes).rows(range(10)).items():
        torch.testing.assert_close(tensor, anchors.rows(range(10))[name], rtol=1e-5, atol=1e-5)


def test_two_processes_leave_the_bytes_of_one(anchors, make):
    assert contents(make(launch=TWO)) == contents(anchors)


def test_half_precision_affects_only_the_storage(anchors, make):
    half = make(dtype="float16").rows(range(10))["anchor_0"]
    assert torch.equal(half, anchors.rows(range(10))["anchor_0"].half())


def test_the_tangent_target_is_stored_with_denoised(make):
    rows = make(with_denoised=True).rows([0])
    assert rows["denoised_0"].shape == rows["anchor_0"].shape


def test_online_nothing_is_computed_and_the_facts_are_the_same(anchors, make):
    online = make(mode="online")
    assert len(online) == 0
    only_cached = {"anchored_prompts": 2}
    assert {**online.manifest, **only_cached, "options": None} == {**anchors.manifest, "options": None}


@pytest.mark.parametrize(
    "changes, same",
    [
        ({"batch_size": 1}, True),
        ({"device": "auto"}, True),
        ({"launch": TWO}, True),
        ({"seed": 1}, False),
        ({"seeds_per_prompt": 6}, False),
        ({"dtype": "float16"}, False),
        ({"with_denoised": True}, False),
        ({"anchor_levels": [{"steps": 3}]}, False),
    ],
)
def test_the_fingerprint_depends_on_the_options_that_change_the_anchors(
    anchors, tiny_teacher, embeddings, changes, same
):
    shards = make_anchors(
        PROMPTS, embeddings, tiny_teacher, backbone_options(), anchor_options(**changes), train_options()
    )
    assert (shards.fingerprint == anchors.fingerprint) == same


@pytest.mark.parametrize(
    "changes", [{"num_steps": 7}, {"guidance_scale": 3.0}, {"dtype": "bfloat16"}, {"resolution": 64}]
)
def test_other_options_of_the_teacher_make_another_cache(anchors, tiny_teacher, embeddings, changes):
    shards = make_anchors(
        PROMPTS, embeddings, tiny_teacher, backbone_options(**changes), anchor_options(), train_options()
    )
    assert shards.fingerprint != anchors.fingerprint


def test_other_prompts_make_another_cache(anchors, tiny_teacher, embeddings):
    prompts = [*PROMPTS[:2], {**PROMPTS[2], "train": True}]
    shards = make_anchors(prompts, embeddings, tiny_teacher, backbone_options(), anchor_options(), train_options())
    assert shards.fingerprint != anchors.fingerprint


def test_other_code_makes_another_cache_also_in_the_teachers_family(anchors, tiny_teacher, embeddings, monkeypatch):
    def identity():
        return make_anchors(
            PROMPTS, embeddings, tiny_teacher, backbone_options(), anchor_options(), train_options()
        ).fingerprint

    assert identity() == anchors.fingerprint
    hashed = []
    monkeypatch.setattr("dpdmd_pipeline.pipelines.anchors.nodes.code_hash", lambda *paths: hashed.append(paths) or "")
    assert identity() != anchors.fingerprint
    assert "backbones.sd3" in hashed[0]


# ---- refused


@pytest.mark.parametrize("steps", [6, 7])
def test_anchor_steps_beyond_the_teachers_last_level_are_refused(tiny_teacher, embeddings, steps):
    options = anchor_options(anchor_levels=[{"steps": steps}])
    with refuses(ValueError, f"anchors.anchor_levels steps={steps}", "backbone.num_steps=6"):
        make_manifest([0, 1], embeddings, tiny_teacher, backbone_options(), options)


@pytest.mark.parametrize(
    "levels, steps",
    [([{"steps": 4}, {"steps": 2}], "[4, 2]"), ([{"sigma": 0.67}, {"sigma": 0.66}], "[2, 2]")],
)
def test_levels_that_do_not_rise_are_refused(tiny_teacher, embeddings, levels, steps):
    with refuses(ValueError, "anchors.anchor_levels", steps):
        make_manifest([0, 1], embeddings, tiny_teacher, backbone_options(), anchor_options(anchor_levels=levels))


@pytest.mark.parametrize(
    "level", [{}, {"steps": 2, "sigma": 0.5}, {"sigma": 0}, {"steps": 0}, {"first_step": {"grid": "shifted"}}]
)
def test_a_level_is_given_in_one_way_and_lies_inside(level):
    with pytest.raises(ValidationError):
        anchor_options(anchor_levels=[level])


@pytest.mark.parametrize(
    "level", [{"sigma": 1.0}, {"sigma": 14.6}, {"first_step": {"grid": [0.5], "num_steps": 1}}], ids=str
)
def test_a_level_outside_the_teachers_schedule_is_refused(make, level):
    with pytest.raises(ValueError, match=r"anchors\.anchor_levels sigma=\S+ .*\b1$"):
        make(anchor_levels=[level])


def test_an_anchor_level_can_be_the_end_of_the_students_first_step(make):
    landing = make(anchor_levels=[{"first_step": {"grid": "shifted", "num_steps": 4}}])
    assert landing.manifest["anchor_steps"] == make(anchor_levels=[{"sigma": 0.75}]).manifest["anchor_steps"]


# ---- only what is drawn


MANY = [{"text": f"{number} red circles", "train": number % 10 < 9, "eval": True} for number in range(40)]  # 36 train


@pytest.fixture
def choose(monkeypatch, tiny_teacher):
    """Rows and anchors of each row in the cache of a training that draws some samples."""
    monkeypatch.setattr("dpdmd_pipeline.pipelines.anchors.nodes.check_embeddings", lambda *_: None)

    def chosen(prompts, cycles, seed=0):
        recipe, embeddings = train_options(max_steps=cycles), SimpleNamespace(fingerprint="", manifest={})
        shards = make_anchors(
            prompts, embeddings, tiny_teacher, backbone_options(), anchor_options(seed=seed), recipe
        ).shards
        return Counter(row for shard in shards.values() for row, _ in shard.args[2])

    return chosen


def test_training_that_draws_fewer_samples_than_prompts_has_one_anchor_for_each_draw(choose):
    trained = [row for row, record in enumerate(MANY) if record["train"]]
    assert choose(MANY, 18) == choose(MANY, 1000) == dict.fromkeys(trained, 5)  # 36 draws: all that there is
    few = choose(MANY, 4)
    assert len(few) == 8 and set(few) < set(trained) and set(few.values()) == {1}
    assert set(few) < set(choose(MANY, 5)) and set(few) != set(choose(MANY, 4, seed=1))


def test_one_prompt_more_changes_at_most_one_of_the_chosen(choose):
    more = [{"text": "a blue square", "train": True, "eval": False}, *MANY]
    before = {MANY[row]["text"] for row in choose(MANY, 4)}
    assert len(before - {more[row]["text"] for row in choose(more, 4)}) <= 1
