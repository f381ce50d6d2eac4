"""What is watched while a student learns, and which turn is kept."""

import pytest
import torch
from tests.training.conftest import RECIPE, WATCHED

from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.watch import Watch, mean_distance

EVERY_TURN = {**WATCHED["watch"], "every": 1}


def weights(roles):
    return torch.cat([parameter.detach().flatten() for parameter in roles.student.parameters()])


def watch_of(prompts=(5, 6, 7, 8), part=64, prompts_asked=2, **changes) -> Watch:
    return Watch(Recipe(**{**RECIPE, "watch": {**EVERY_TURN, "prompts": prompts_asked, **changes}}), prompts, part)


def test_the_distance_of_gaussian_latents_is_the_square_root_of_two():
    latents = torch.randn(8, 16, 4, 32, 32, generator=torch.Generator().manual_seed(0))
    assert mean_distance(latents) == pytest.approx(2**0.5, rel=1e-3)


def test_the_distance_is_of_pairs_of_one_prompt():
    one, other = torch.zeros(1, 2, 3), torch.full((1, 2, 3), 7.0)  # two prompts, each collapsed
    assert mean_distance(torch.cat([one, other])) == 0
    apart = torch.stack([torch.zeros(1, 3), torch.full((1, 3), 2.0)], dim=1)  # one prompt, two latents 2 apart
    assert mean_distance(apart) == 2


def test_a_small_distance_of_large_latents_is_not_rounded_away():
    latents = 1000 + torch.tensor([[[0.0] * 64, [0.01] * 64]])
    assert mean_distance(latents) == pytest.approx(0.01, rel=0.01)


def test_prompts_are_taken_evenly_and_always_the_same():
    seen = []
    watch = watch_of(prompts=range(10, 20), part=3)

    def draw(rows, places):
        seen.append((list(rows), places))
        return torch.zeros(len(rows), 1, 2, 2)

    for _ in range(2):
        watch.measure(draw, lambda rows, places, latents: latents + 1)
    assert seen == 2 * [([10, 10, 15], range(3)), ([15], range(3, 4))]


def test_the_correction_is_the_change_the_teacher_makes():
    found = watch_of().measure(lambda rows, _: torch.zeros(len(rows), 1, 2, 2), lambda *given: given[2] + 0.5)
    assert found["correction"] == 0.5 and found["latent_diversity"] == 0


# (diversity, correction) of the turns, at a floor of .9 of the teacher's 10 -> the turn that is kept
RULE = {
    "the least correction of those with enough": ([(9.5, 0.3), (9.2, 0.1), (9.9, 0.2)], 2),
    "a likely picture without diversity is none": ([(9.5, 0.3), (1.0, 0.01)], 1),
    "enough comes before all that has not": ([(8.9, 0.01), (9.0, 0.9)], 2),
    "as long as none has enough, the most diverse": ([(1.0, 0.1), (3.0, 0.9), (2.0, 0.2)], 2),
    "of equals the first": ([(9.5, 0.3), (9.9, 0.3)], 1),
}


@pytest.mark.parametrize("case", RULE)
def test_the_best_turn_by_the_declared_rule(case):
    measured, kept = RULE[case]
    watch = watch_of(keep="best", diversity_floor=0.9)
    watch.of_teacher = {"latent_diversity": 10.0}
    for step, (diversity, correction) in enumerate(measured):
        again = watch_of(keep="best", diversity_floor=0.9)  # as a resumed run has it
        again.load_state_dict(watch.state_dict())
        watch = again
        watch.is_best(step, diversity, correction)
    assert watch.best_step == kept


def test_measuring_does_not_change_the_student(start, tmp_path):
    plain, records = start(tmp_path / "plain")
    without = list(records)
    watched, records = start(tmp_path / "watched", watch=EVERY_TURN)
    history = list(records)
    assert torch.equal(weights(plain), weights(watched))
    own = {"latent_diversity", "correction", "latent_diversity_teacher", "correction_teacher"}
    assert [set(row) - own for row in history] == [set(row) for row in without]
    assert all(own <= set(row) for row in history)
    assert len({row["latent_diversity_teacher"] for row in history}) == 1


def test_the_last_turn_is_always_measured(start, tmp_path):
    _, records = start(tmp_path, watch={**EVERY_TURN, "every": 3})
    assert ["correction" in row for row in records] == [False, False, True, True]


def test_parts_measure_the_same_as_the_whole(start, tmp_path):
    found = []
    for part in (1, 2):
        _, records = start(tmp_path / str(part), {"student_micro_batch": part}, max_steps=1, watch=EVERY_TURN)
        found.append(next(records))
    for name in ("latent_diversity", "correction"):
        assert found[0][name] == pytest.approx(found[1][name], rel=1e-3)


def test_the_best_turn_is_the_student_of_a_run_that_ended_there(start, tmp_path):
    """Nothing is diverse enough for a floor of 1, or everything for one of 0; where the best lies, the numbers say."""
    best = {**EVERY_TURN, "keep": "best", "diversity_floor": 0.0}
    kept, records = start(tmp_path / "best", watch=best, decay=0.0)
    history = list(records)
    turn = min(history, key=lambda row: row["correction"])["step"]
    assert {row["best_step"] for row in history[turn - 1 :]} == {turn}
    ended, records = start(tmp_path / "ended", decay=0.0, max_steps=turn)
    list(records)
    assert torch.equal(weights(kept), weights(ended))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"watch": {**EVERY_TURN, "every": 0, "keep": "best"}}, "keep=best needs measurements: set every"),
        ({"watch": {**EVERY_TURN, "keep": "best"}, "ema": 0.5}, "watch.keep=best keeps one turn's weights, ema=0.5"),
        ({"watch": {**EVERY_TURN, "images_per_prompt": 1}}, "greater than or equal to 2"),
        ({"watch": {**EVERY_TURN, "level": 1.5}}, "less than or equal to 1"),
    ],
)
def test_what_cannot_be_watched_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        Recipe(**{**RECIPE, **changes})


def test_of_fewer_prompts_all_are_taken():
    seen = []
    watch = watch_of(prompts=(4, 9), prompts_asked=3)
    watch.measure(lambda rows, _: seen.extend(rows) or torch.zeros(len(rows), 1, 2, 2), lambda *given: given[2])
    assert seen == [4, 4, 9, 9]
