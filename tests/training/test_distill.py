"""The loop: losses on record, exact resume, variants, and executions that change rounding only."""

import gc
import json
import os
import resource
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import DMD, RECIPE, WATCHED

from dpdmd_pipeline.dpdmd.algorithm import follow_anchors, match_teacher, student_loss
from dpdmd_pipeline.training import distill
from dpdmd_pipeline.training.checkpoint import LOSSES, Checkpoints
from dpdmd_pipeline.training.run import Trained

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


@pytest.mark.parametrize("every", [0, 1])
def test_comparing_the_gradients_changes_nothing_and_can_be_off(start, tmp_path, every):
    _, records = start(tmp_path / "every_second", max_steps=2)
    _, compared = start(tmp_path / "other", {"ratio_every": every}, max_steps=2)
    for row, other in zip(records, compared, strict=True):
        assert ("grad_ratio" in other) == bool(every)
        assert row.items() - {"grad_ratio": row.get("grad_ratio")}.items() <= other.items()


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
    if os.environ.get("DPDMD_RECORD_GOLDEN"):  # after an intended change of the mathematics, with -n 0
        recorded = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
        GOLDEN.write_text(json.dumps({**recorded, variant: measured}, indent=1) + "\n")
    torch.testing.assert_close(
        torch.tensor(measured), torch.tensor(json.loads(GOLDEN.read_text())[variant]), rtol=2e-3, atol=1e-4
    )


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_run_repeats_an_uninterrupted_one_bit_for_bit(start, tmp_path, stop_after):
    whole, records = start(tmp_path / "whole")
    history = list(records)
    _, records = start(tmp_path / "stopped")
    for _ in range(stop_after):
        next(records)
    records.close()  # as Ctrl-C does
    resumed, records = start(tmp_path / "stopped")
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
    with pytest.raises(ValueError, match=r"loss.* (nan|inf) .*step \d.*prompts \[[0-9, ]+\].*1e\+30"):
        list(records)


def test_the_checkpoint_on_disk_survives_a_failed_step(start, tmp_path):
    roles, records = start(tmp_path)
    for _ in range(3):
        next(records)
    with torch.no_grad():
        next(roles.fake_score.parameters()).fill_(torch.nan)
    with refuses(ValueError, "fake_score_loss", "nan", "step 4"):
        list(records)
    assert Checkpoints(tmp_path).latest() == 2


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_the_students_learning_rate_falls_in_the_last_share_of_the_cycles(start, tmp_path, decay, monkeypatch):
    rates, plain = [], torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    _, records = start(tmp_path, decay=decay)
    list(records)
    # two fake-score updates, then the student's
    fake_score, student = [rates[i] for i in range(len(rates)) if i % 3 < 2], rates[2::3]
    assert fake_score == [1e-3] * 8
    shares = {0.0: [1, 1, 1, 1], 0.5: [1, 1, 1, 0.5], 1.0: [1, 0.75, 0.5, 0.25]}[decay]
    assert student == pytest.approx([1e-3 * share for share in shares])


VARIANTS = {
    "lora": {"roles": "lora"},
    "bfloat16": {"precision": "bfloat16"},
    "averaged": {"ema": 0.5},
    "renoise": {"between_steps": "renoise"},
    "one_graded_step": {"graded_steps": "random"},
    "last_step": {"graded_steps": "last"},
    "shared_rollout": {"fake_rollout": "shared"},
    "warmed_up": {"fake_score_warmup": 3, "warmup": 2},
    "guided_in_an_interval": {"guidance_interval": [0.3, 0.7]},
    "watched": WATCHED,
    "best_cycle": {"watch": {**WATCHED["watch"], "every": 1, "keep": "best"}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_resumes_bit_for_bit(start, tmp_path, variant):
    whole, records = start(tmp_path / "whole", **VARIANTS[variant])
    before = weights(whole)
    history = list(records)
    assert not torch.equal(before, weights(whole))
    _, records = start(tmp_path / "stopped", **VARIANTS[variant])
    for _ in range(3):  # a checkpoint after two cycles, and one by Ctrl-C after the third
        next(records)
    records.close()
    resumed, records = start(tmp_path / "stopped", **VARIANTS[variant])
    assert list(records) == history[3:]
    assert torch.equal(weights(resumed), weights(whole))


def test_a_batch_may_be_worked_through_in_micro_batches(start, tmp_path):
    whole, records = start(tmp_path / "whole", batch_size=4, execution={"student_micro_batch": 4})
    history = list(records)
    sizes = {"student_micro_batch": 3, "fake_score_micro_batch": 1}
    split, records = start(tmp_path / "split", batch_size=4, execution=sizes)
    for ours, theirs in zip(records, history, strict=True):
        ours.pop("grad_ratio", None), theirs.pop("grad_ratio", None)  # of the first micro-batch only
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(weights(split), weights(whole), rtol=1e-3, atol=2e-4)


def test_an_interval_of_guidance_changes_the_teacher_of_dmd_and_not_the_anchors(start, tmp_path):
    intervals = {"everywhere": [0.0, 1.0], "nowhere": [0.0, 1e-4]}
    always, never = (
        next(start(tmp_path / name, max_steps=1, guidance_interval=interval)[1]) for name, interval in intervals.items()
    )
    assert always["diversity_loss"] == never["diversity_loss"] and always["dmd_loss"] != never["dmd_loss"]


@pytest.mark.parametrize(
    "execution",
    [
        {"guidance_batch": "apart"},
        {"fused": True},
        {"rollout_micro_batch": 3},
        {"rollout_micro_batch": 64},
    ],
    ids=str,
)
def test_an_execution_changes_the_student_by_rounding_only(start, tmp_path, execution):
    plain, records = start(tmp_path / "plain")
    history = list(records)
    other, records = start(tmp_path / "other", execution=execution)
    for ours, theirs in zip(records, history, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    torch.testing.assert_close(weights(other), weights(plain), rtol=1e-3, atol=2e-4)


def test_losses_are_in_a_file_as_they_come_and_a_resumed_run_continues_it(start, tmp_path):
    def losses():
        return [json.loads(line) for line in (tmp_path / LOSSES).read_text().splitlines()]

    stopped = start(tmp_path, execution={"checkpoint_every": 2})[1]
    history = [next(stopped) for _ in range(3)]
    assert losses() == history  # the third cycle is in no checkpoint
    resumed = start(tmp_path)[1]
    again = [next(resumed)]
    assert again == history[2:] and losses() == history
    history += resumed
    assert losses() == history
    stopped.close()


def test_a_full_disk_ends_the_run_with_one_line_and_the_same_command_continues_it(start, tmp_path):
    history = [*start(tmp_path / "whole", max_steps=3)[1]]
    _, records = start(tmp_path / "full", execution={"checkpoint_every": 1}, max_steps=3)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        done = [next(records), next(records)]  # the first checkpoint is on the disk: the second one waits for it
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        with refuses(OSError, str(tmp_path / "full" / "step_"), "file size limit") as error:
            done += records
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    saved = Checkpoints(tmp_path / "full").latest()
    assert "\n" not in str(error.value) and saved in (1, 2)
    assert [*start(tmp_path / "full", max_steps=3)[1]] == history[saved:]


@pytest.fixture
def reads(monkeypatch):
    """Reads of tensors' values and tensors made of numbers, by function: on a GPU, each waits for all earlier work."""
    counts = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def call(*args, **options):
            frame = sys._getframe(1)
            while frame.f_code.co_name.startswith("<"):  # a comprehension
                frame = frame.f_back
            if any(package in frame.f_code.co_filename for package in ("dpdmd_pipeline", "diffusers")):
                counts[frame.f_code.co_name] += 1
            return original(*args, **options)

        monkeypatch.setattr(owner, name, call)

    for name in ("__bool__", "__float__", "__int__", "cpu", "item", "numpy", "tolist"):
        counted(torch.Tensor, name)
    counted(torch, "tensor")
    return counts


@pytest.mark.parametrize("variant", ["lora", "tangent", "watched"])
def test_a_cycle_reads_its_record_and_nothing_else(start, tmp_path, reads, variant):
    changes = {"lora": {"roles": "lora"}, "tangent": {"target": "tangent", "anchored_steps": 2}, "watched": WATCHED}
    micro_batches = {"student_micro_batch": 1, "fake_score_micro_batch": 1, "checkpoint_every": 100}
    _, records = start(tmp_path, execution=micro_batches, **changes.get(variant, {}))
    next(records)  # in the second cycle nothing is new
    reads.clear()
    next(records)
    measured = {"_means": 1, "watch_cycle": 2} if variant == "watched" else {}  # of the teacher, once in a run
    assert reads == {"fetch_record": 1, **measured}


@pytest.mark.parametrize("minutes, steps", [(1e-9, 1), (60, 0)])
def test_a_checkpoint_also_comes_after_so_many_minutes(start, tmp_path, minutes, steps):
    options = {"checkpoint_every": 100, "checkpoint_minutes": minutes, "checkpoint_background": False}
    _, records = start(tmp_path, execution=options)
    next(records)
    assert Checkpoints(tmp_path).latest() == steps


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_final_student_is_the_average_if_the_recipe_asks_for_one(start, tmp_path, kind):
    last, records = start(tmp_path / "last", roles=kind)
    path = [weights(last).clone() for _ in records]
    averaged, records = start(tmp_path / "averaged", ema=0.5, roles=kind)
    list(records)
    expected = path[0]
    for current in path[1:]:
        expected = 0.5 * expected + 0.5 * current
    torch.testing.assert_close(weights(averaged), expected, rtol=1e-4, atol=1e-6)


def test_an_average_of_adapters_copies_no_base(start, tmp_path, backbone):
    """Counted on all parameters in memory, since a view hides its base from torch."""
    before = {id(parameter) for parameter in parameters_in_memory()}
    one = sum(parameter.numel() for parameter in backbone.load_model().parameters())
    _, records = start(tmp_path, roles="lora", ema=0.5)
    next(records)
    new = {p.data_ptr(): p.numel() for p in parameters_in_memory() if id(p) not in before}
    assert one < sum(new.values()) <= 1.25 * one


def parameters_in_memory():
    gc.collect()
    return [item for item in gc.get_objects() if type(item) is torch.nn.Parameter]


def test_gradients_of_the_two_losses_add_up_although_the_first_is_back_propagated_at_once(start, tmp_path, monkeypatch):
    """One cycle without clipping: its gradient is that of L_DMD + lambda L_div, taken together by Algorithm 1."""
    arguments, gradients = {}, []

    def follow(student, **options):
        arguments.update(options)
        return follow_anchors(student, **options)

    def match(*roles, **options):
        arguments.update(options, roles=roles)
        return match_teacher(*roles, **options)

    def update(trained):
        parameters = list(trained.network.parameters())
        gradients[:] = [p.grad.clone() if p.grad is not None else None for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        return torch.zeros(())

    monkeypatch.setattr(distill, "follow_anchors", follow)
    monkeypatch.setattr(distill, "match_teacher", match)
    monkeypatch.setattr(Trained, "update", update)
    roles, records = start(tmp_path, max_steps=1, diversity_weight=2.0)
    next(records)
    options = {name: value for name, value in arguments.items() if name not in {"roles", "latents", "first"}}
    losses = student_loss(*arguments["roles"], **options)
    parameters = [parameter for parameter in roles.student.parameters() if parameter.requires_grad]
    together = torch.autograd.grad(losses.dmd + 2.0 * losses.diversity, parameters, allow_unused=True)
    for ours, theirs in zip(gradients, together, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
