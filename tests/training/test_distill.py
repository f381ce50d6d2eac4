import json
import os
from pathlib import Path

import pytest
import torch
from tests.training.conftest import DMD, RECIPE

from dpdmd_pipeline.training.checkpoint import Checkpoints

GOLDEN = Path(__file__).parents[1] / "golden" / "losses.json"


def weights(roles) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in roles.student.parameters()])


def test_training_moves_student_and_fake_score_and_leaves_the_teacher(start, tmp_path):
    roles, records = start(tmp_path)
    before = [torch.cat([p.detach().flatten() for p in role.parameters()]) for role in (roles.teacher, roles.student)]
    history = list(records)
    after = [torch.cat([p.detach().flatten() for p in role.parameters()]) for role in (roles.teacher, roles.student)]
    assert torch.equal(before[0], after[0]) and not torch.equal(before[1], after[1])
    assert [row["step"] for row in history] == [1, 2, 3, 4]
    assert [("grad_ratio" in row) for row in history] == [True, False, True, False]


@pytest.mark.parametrize("variant", ["dp_dmd", "dmd", "two_anchored_steps", "tangent", "through_the_first_step"])
def test_losses_of_the_tiny_run_are_those_on_record(start, tmp_path, variant):
    changes = {
        "dp_dmd": {},
        "dmd": DMD,
        "two_anchored_steps": {"anchored_steps": 2},
        "tangent": {"target": "tangent"},
        "through_the_first_step": {"stop_gradient": False},
    }[variant]
    _, records = start(tmp_path, **changes)
    measured = [[row["dmd_loss"], row["diversity_loss"], row["fake_score_loss"]] for row in records]
    if os.environ.get("DPDMD_RECORD_GOLDEN"):  # after a change of the mathematics made on purpose, with -n 0
        known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**known, variant: measured}, indent=1) + "\n")
    torch.testing.assert_close(
        torch.tensor(measured), torch.tensor(json.loads(GOLDEN.read_text())[variant]), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(start, tmp_path, stop_after):
    whole, records = start(tmp_path / "whole")
    history = list(records)
    _, records = start(tmp_path / "broken")
    for _ in range(stop_after):
        next(records)
    records.close()  # as Ctrl-C does
    resumed, records = start(tmp_path / "broken")
    assert list(records) == history[stop_after:]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_finished_run_is_reused_and_keeps_the_student_alone(start, tmp_path):
    whole, records = start(tmp_path)
    history = list(records)
    again, records = start(tmp_path)
    assert list(records) == []
    assert torch.equal(weights(again), weights(whole))
    _, state = Checkpoints(tmp_path).load_latest()
    assert set(state) == {"student", "history"} and state["history"] == history


def test_a_loss_that_is_not_finite_stops_with_step_and_prompts(start, tmp_path):
    roles, records = start(tmp_path, student={**RECIPE["student"], "learning_rate": 1e30})
    with pytest.raises(
        ValueError, match=r"loss is (nan|inf) at step \d, prompts \[[0-9, ]+\]: lower the learning rate"
    ):
        list(records)


def test_the_checkpoint_on_disk_survives_a_failed_step(start, tmp_path):
    roles, records = start(tmp_path)
    for _ in range(3):
        next(records)
    with torch.no_grad():
        next(roles.fake_score.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="fake_score_loss is nan at step 4"):
        list(records)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_students_rate_falls_in_the_last_share_of_the_turns(start, tmp_path, decay, monkeypatch):
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, records = start(tmp_path, decay=decay)
    list(records)
    fake, student = (
        [rates[i] for i in range(len(rates)) if i % 3 < 2],
        rates[2::3],
    )  # two fake-score turns, then the student
    assert fake == [1e-3] * 8
    shares = {0.0: [1, 1, 1, 1], 0.5: [1, 1, 1, 0.5], 1.0: [1, 0.75, 0.5, 0.25]}[decay]
    assert student == pytest.approx([1e-3 * share for share in shares])
