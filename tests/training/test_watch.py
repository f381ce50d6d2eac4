"""Measurements during training, and the choice of the best cycle."""

from types import SimpleNamespace

import pytest
import torch
from tests.training.conftest import WATCHED, recipe_with

from dpdmd_pipeline.dpdmd.noise import flow_level
from dpdmd_pipeline.training.watch import Watch, mean_distance, measure

EVERY_CYCLE = {**WATCHED["watch"], "every": 1}


def weights(roles):
    return torch.cat([parameter.detach().flatten() for parameter in roles.student.parameters()])


def watch_of(training_prompts=(5, 6, 7, 8), prompts=2, **changes) -> Watch:
    return Watch.of(recipe_with(watch={**EVERY_CYCLE, "prompts": prompts, **changes}), training_prompts)


def test_the_distance_of_gaussian_latents_is_the_square_root_of_two():
    latents = torch.randn(8, 16, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert mean_distance(latents) == pytest.approx(2**0.5, rel=1e-3)


def test_the_distance_is_of_pairs_of_one_prompt():
    one, other = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 7.0)  # two prompts, each collapsed
    assert mean_distance(torch.cat([one, other])) == 0
    pair = torch.stack([torch.zeros(1, 3), torch.full((1, 3), 2.0)], dim=1)  # one prompt, two latents at distance 2
    assert mean_distance(pair) == 2


def test_a_small_distance_of_large_latents_is_not_rounded_away():
    latents = 1000 + torch.tensor([[[0.0] * 64, [0.01] * 64]])
    assert mean_distance(latents) == pytest.approx(0.01, rel=0.01)


def test_prompts_are_chosen_evenly_and_always_the_same():
    calls = []
    watch = watch_of(training_prompts=range(10, 20))

    def draw(run, draws, cond):
        calls.append((cond, draws.indices))
        return draw_zeros(run, draws, cond)

    for _ in range(2):
        measure(run_with(micro_batch=3), watch, draw)
    assert calls == 2 * [([10, 10, 15], range(3)), ([15], range(3, 4))]


def test_the_correction_is_the_change_the_teacher_makes():
    values = measure(run_with(micro_batch=64), watch_of(level=0.25), draw_zeros)
    assert values["correction"] == 0.5 and values["latent_diversity"] == 0


def run_with(micro_batch):
    """Draws and embeddings that show their origin; zero noise; a teacher that changes x0 by twice the level."""

    def batch(stream, update, indices):
        return SimpleNamespace(indices=indices, noise=lambda purpose: torch.zeros(len(indices), 1, 2, 2))

    return SimpleNamespace(
        execution=SimpleNamespace(student_micro_batch=micro_batch),
        draws=SimpleNamespace(batch=batch),
        cond=list,
        backbone=SimpleNamespace(random_level=lambda uniform: flow_level(uniform.view(-1, 1, 1, 1))),
        guided_teacher=lambda cond: lambda noisy, level: noisy + 2 * level.sigma,
    )


def draw_zeros(run, draws, cond):
    return torch.zeros(len(cond), 1, 2, 2)


# (diversity, correction) of the cycles, at a floor of .9 of the teacher's 10 -> the best cycle
RULE = {
    "the least correction of those with enough": ([(9.5, 0.3), (9.2, 0.1), (9.9, 0.2)], 2),
    "a likely picture without diversity is none": ([(9.5, 0.3), (1.0, 0.01)], 1),
    "enough comes before all that has not": ([(8.9, 0.01), (9.0, 0.9)], 2),
    "as long as none has enough, the most diverse": ([(1.0, 0.1), (3.0, 0.9), (2.0, 0.2)], 2),
    "of equals the first": ([(9.5, 0.3), (9.9, 0.3)], 1),
}


@pytest.mark.parametrize("case", RULE)
def test_the_best_cycle_follows_the_declared_rule(case):
    measured, best = RULE[case]
    watch = watch_of(keep="best", diversity_floor=0.9)
    watch.teacher = {"latent_diversity": 10.0}
    for cycle, (diversity, correction) in enumerate(measured):
        resumed = watch_of(keep="best", diversity_floor=0.9)
        resumed.load_state_dict(watch.state_dict())
        watch = resumed
        watch.is_best(cycle, diversity, correction)
    assert watch.best["step"] == best


def test_measuring_does_not_change_the_student(start, tmp_path):
    plain, records = start(tmp_path / "plain")
    without = list(records)
    watched, records = start(tmp_path / "watched", watch=EVERY_CYCLE)
    history = list(records)
    assert torch.equal(weights(plain), weights(watched))
    own = {"latent_diversity", "correction", "latent_diversity_teacher", "correction_teacher"}
    assert [set(row) - own for row in history] == [set(row) for row in without]
    assert all(own <= set(row) for row in history)
    assert len({row["latent_diversity_teacher"] for row in history}) == 1


def test_the_last_cycle_is_always_measured(start, tmp_path):
    _, records = start(tmp_path, watch={**EVERY_CYCLE, "every": 3})
    assert ["correction" in row for row in records] == [False, False, True, True]


def test_micro_batches_give_the_same_measurements_as_the_whole(start, tmp_path):
    first = []
    for size in (1, 2):
        _, records = start(tmp_path / str(size), {"student_micro_batch": size}, max_steps=1, watch=EVERY_CYCLE)
        first.append(next(records))
    for name in ("latent_diversity", "correction"):
        assert first[0][name] == pytest.approx(first[1][name], rel=1e-3)


def test_the_best_cycle_is_the_student_of_a_run_that_ended_there(start, tmp_path):
    """With a floor of 0 every cycle is diverse enough, so the least correction decides."""
    watch = {**EVERY_CYCLE, "keep": "best", "diversity_floor": 0.0}
    best, records = start(tmp_path / "best", watch=watch, decay=0.0)
    history = list(records)
    cycle = min(history, key=lambda row: row["correction"])["step"]
    assert {row["best_step"] for row in history[cycle - 1 :]} == {cycle}
    short, records = start(tmp_path / "short", decay=0.0, max_steps=cycle)
    list(records)
    assert torch.equal(weights(best), weights(short))


@pytest.mark.parametrize(
    "changes, facts",
    [
        ({"watch": {**EVERY_CYCLE, "every": 0, "keep": "best"}}, "keep=best.*every=0"),
        ({"watch": {**EVERY_CYCLE, "keep": "best"}, "ema": 0.5}, "watch.keep=best.*ema=0.5"),
        ({"watch": {**EVERY_CYCLE, "images_per_prompt": 1}}, "images_per_prompt(.|\n)*input_value=1,"),
        ({"watch": {**EVERY_CYCLE, "level": 1.5}}, "level(.|\n)*input_value=1.5,"),
    ],
)
def test_impossible_measurements_are_refused(changes, facts):
    with pytest.raises(ValueError, match=facts):
        recipe_with(**changes)


def test_of_fewer_prompts_all_are_measured():
    assert watch_of(training_prompts=(4, 9), prompts=3).rows == [4, 4, 9, 9]
