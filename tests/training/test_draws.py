"""Draws depend on seed, stream, update and batch index alone."""

from types import SimpleNamespace

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import ALONE, execution_with, recipe_with

from dpdmd_pipeline.training.draws import Draws, SampleDraws, graded_step, micro_batches, process_share

BACKBONE = SimpleNamespace(latent_shape=(2, 3, 3), random_level=lambda uniform: uniform)


def draws(seed: int = 0, *, renoise: bool = False) -> Draws:
    return Draws(BACKBONE, seed, [4, 5, 9], renoise, torch.device("cpu"))


def everything(samples: SampleDraws) -> list[torch.Tensor]:
    return [samples.noise(), samples.noise("renoise"), samples.level(), torch.tensor(samples.prompts())]


def test_a_sample_has_the_same_draws_in_every_part_of_every_split():
    whole = everything(draws().batch("student", 7, range(6)))
    parts = [everything(draws().batch("student", 7, part)) for part in micro_batches(range(6), 4)]
    for together, *split in zip(whole, *parts, strict=True):
        assert torch.equal(together, torch.cat(split))
    mixed = SampleDraws(draws(), "student", [(3, 0), (7, 5)])  # of two updates
    assert all(torch.equal(mixed_draw[1], draw[5]) for mixed_draw, draw in zip(everything(mixed), whole, strict=True))


def test_seed_stream_update_and_batch_index_each_change_the_noise():
    batches = [
        draws().batch("student", 7, [0]),
        draws(seed=1).batch("student", 7, [0]),
        draws().batch("watch", 7, [0]),
        draws().batch("student", 8, [0]),
        draws().batch("student", 7, [1]),
    ]
    assert len({tuple(batch.noise().flatten().tolist()) for batch in batches}) == len(batches)


def test_only_a_renoising_student_has_fresh_noise_between_its_steps():
    assert draws().batch("student", 0, [0]).fresh() is None
    fresh = draws(renoise=True).batch("student", 0, [0]).fresh()
    assert fresh(0).shape == (1, 2, 3, 3) and not torch.equal(fresh(0), fresh(1))


@pytest.mark.parametrize("mode, steps", [("all", {None}), ("last", {3}), ("random", {1, 2, 3})])
def test_the_graded_step_is_one_of_the_remaining_steps(mode, steps):
    assert {graded_step(recipe_with(graded_steps=mode), cycle) for cycle in range(50)} == steps


def test_processes_share_a_batch_evenly_or_not_at_all():
    assert [process_share(6, process, 3) for process in range(3)] == [range(2), range(2, 4), range(4, 6)]
    with refuses(ValueError, "batch_size=6", "4"):
        process_share(6, 0, 4)


def test_micro_batches_are_fitted_to_a_processs_share_of_the_batch():
    two = execution_with(launch={**ALONE, "processes": 2}, student_micro_batch=9, fake_score_micro_batch=2)
    fitted = two.fitted_to(8)
    assert (fitted.student_micro_batch, fitted.fake_score_micro_batch) == (4, 2)
    assert fitted.rollout_micro_batch == two.rollout_micro_batch and fitted.shards == 1
