"""The cost model against counted passes, and against the numbers of the published recipe."""

from dataclasses import astuple

import pytest
from tests.training.conftest import ANCHOR_STEPS, DMD, GUIDANCE, NUM_STEPS, RECIPE, WATCHED

from dpdmd_pipeline.dpdmd.sampling import sample_seeds
from dpdmd_pipeline.training.cost import (
    Passes,
    Settings,
    cycle_cost,
    describe_cost,
    fake_score_turn,
    graded_steps,
    student_turn,
    watch_cost,
)
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import AdapterView

VARIANTS = {
    "dp_dmd": {},
    "dmd": DMD,
    "dmd_last_step": {**DMD, "graded_steps": "last"},
    "dmd_random_step": {**DMD, "graded_steps": "random"},
    "two_anchored_steps": {"anchored_steps": 2},
    "tangent": {"target": "tangent"},
    "through_the_first_step": {"stop_gradient": False},
    "through_two_steps": {"anchored_steps": 2, "stop_gradient": False},
    "renoise": {"between_steps": "renoise"},
    "last_step": {"graded_steps": "last"},
    "random_step": {"graded_steps": "random"},
    "random_of_two": {"graded_steps": "random", "anchored_steps": 2},
    "shared_rollout": {"fake_rollout": "shared", "fake_score_turns": 3},
    "warmed_up": {"fake_score_warmup": 3},
    "shared_and_warmed_up": {"fake_score_warmup": 3, "fake_rollout": "shared"},
    "two_steps": {"num_steps": 2, "grid": [1.0, 0.5]},
    "averaged": {"ema": 0.5},
    "balanced": {"weighting": "balanced"},
    "balanced_through_the_first_step": {"weighting": "balanced", "stop_gradient": False},
    "guided_in_an_interval": {"guidance_interval": [0.3, 0.7]},
    "watched": WATCHED,
    "watched_every_turn": {"watch": {**WATCHED["watch"], "every": 1, "images_per_prompt": 3}},
    "best_of_the_watched": {"watch": {**WATCHED["watch"], "keep": "best"}, "guidance_interval": [0.3, 0.7]},
    "lora_watched": {**WATCHED, "roles": "lora"},
    "lora": {"roles": "lora"},
    "lora_random_step": {"roles": "lora", "graded_steps": "random", "fake_rollout": "shared"},
}


class Counted:
    """Passes of samples through the networks of a run, by hooks on the networks, on a block, and on the last layer."""

    def __init__(self, *networks) -> None:
        self.forward = self.through_block = self.backward = 0
        self.handles = [network.register_forward_hook(self._forward) for network in networks]
        for network in {n._shared[0] if isinstance(n, AdapterView) else n for n in networks}:
            block, last = network.transformer_blocks[0], network.proj_out
            self.handles.append(block.register_forward_pre_hook(self._block, with_kwargs=True))
            self.handles.append(last.register_full_backward_hook(self._backward))

    def _forward(self, _module, _args, output) -> None:
        self.forward += len(output[0])

    def _block(self, _module, args, kwargs) -> None:
        self.through_block += len(next(iter((*args, *kwargs.values()))))

    def _backward(self, _module, _into, out) -> None:
        self.backward += len(out[0])

    @property
    def passes(self) -> Passes:
        return Passes(self.forward, self.backward, self.through_block - self.forward)


@pytest.fixture
def count(ask_teacher):
    """Counts from now on, the teacher that is asked for anchors included."""
    made = []

    def begin(roles) -> Counted:
        made.append(Counted(roles.teacher, roles.student, roles.fake_score, ask_teacher.teacher))
        return made[-1]

    yield begin
    for handle in (handle for counted in made for handle in counted.handles):
        handle.remove()


def expected(recipe: Recipe, settings: Settings, measured: int, cycles: int) -> Passes:
    """Of all samples of a run of so many cycles, in so many of which the gradients' ratio is measured."""
    cost = cycle_cost(recipe, settings)
    steps = graded_steps(recipe)
    drawn = [steps[sample_seeds(recipe.seed, "student/graded_step", step, 1)[0] % len(steps)] for step in range(cycles)]
    total = cost.warmup + cycles * cost.fake_score_turns + measured * cost.ratio
    for step in drawn:
        total += student_turn(recipe, settings, step)
    return recipe.batch_size * total + watch_cost(recipe, settings)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "repeated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_of_a_run_are_exactly_those_counted(start, count, tmp_path, variant, checkpointing):
    changes = {"max_steps": 2, **VARIANTS[variant]}
    roles, records = start(tmp_path, {"ratio_every": 2}, checkpointing, **changes)
    counted = count(roles)
    list(records)
    settings = Settings(GUIDANCE, checkpointing, ANCHOR_STEPS, with_denoised=True, teacher_steps=NUM_STEPS)
    asked = expected(Recipe(**{**RECIPE, **changes}), settings, measured=1, cycles=2)
    assert astuple(counted.passes) == astuple(asked)


def test_a_guided_call_costs_two_passes_together_or_apart(start, count, tmp_path):
    changes = {"max_steps": 1, "guidance_interval": [0.3, 0.7]}
    roles, records = start(tmp_path, {"ratio_every": 2, "guidance_batch": "apart"}, **changes)
    counted = count(roles)
    list(records)
    settings = Settings(GUIDANCE, False, ANCHOR_STEPS, with_denoised=True)
    asked = expected(Recipe(**{**RECIPE, **changes}), settings, measured=1, cycles=1)
    assert astuple(counted.passes) == astuple(asked)


def test_a_batch_in_parts_costs_the_same_but_for_the_measurement(start, count, tmp_path):
    """The gradients' ratio is measured on the first part alone."""
    parts = {"ratio_every": 1, "student_micro_batch": 3, "fake_score_micro_batch": 1}
    roles, records = start(tmp_path, parts, batch_size=4, max_steps=1)
    counted = count(roles)
    list(records)
    recipe = Recipe(**{**RECIPE, "batch_size": 4, "max_steps": 1})
    settings = Settings(GUIDANCE, False, ANCHOR_STEPS, with_denoised=True)
    cost = cycle_cost(recipe, settings)
    assert astuple(counted.passes) == astuple(4 * cost.cycle + 3 * cost.ratio)


def published(anchor_steps: int, cached: bool = False, **changes) -> tuple[Recipe, Settings]:
    recipe = Recipe(**{**RECIPE, "fake_score_turns": 5, **changes})
    return recipe, Settings(3.5, gradient_checkpointing=True, online_anchors=() if cached else [anchor_steps])


@pytest.mark.parametrize("anchor_steps, student, cycle", [(5, 29, 69), (10, 39, 79)])
def test_the_published_recipe_costs_what_its_own_loop_does(anchor_steps, student, cycle):
    recipe, settings = published(anchor_steps)
    cost = cycle_cost(recipe, settings)
    assert cost.student_turn.total == student and cost.cycle.total == cycle
    assert fake_score_turn(recipe, settings, draws=True).total == 8


@pytest.mark.parametrize("anchor_steps, cycle", [(5, 69), (10, 79)])
def test_each_saving_is_what_is_known_of_it(anchor_steps, cycle):
    left = {
        name: cycle_cost(*published(anchor_steps, **changes)).cycle.total
        for name, changes in {
            "cached": {"cached": True},
            "shared": {"fake_rollout": "shared"},
            "last": {"graded_steps": "last"},
        }.items()
    }
    # the teacher's guided walk; four of five rollouts of four steps; two of three backward and repeated passes
    assert left == {"cached": cycle - 2 * anchor_steps, "shared": cycle - 4 * 4, "last": cycle - 2 * 3}


def test_all_savings_together_leave_29_of_69():
    """Adapters take so little memory that nothing has to be repeated."""
    recipe, _ = published(5, fake_rollout="shared", graded_steps="random")
    assert cycle_cost(recipe, Settings(3.5, gradient_checkpointing=False)).cycle.total == 29


def test_without_guidance_the_teacher_is_asked_once():
    recipe = Recipe(**RECIPE)
    once, twice = (student_turn(recipe, Settings(scale, False, [5]), None).forward for scale in (1.0, 3.5))
    assert twice - once == 5 + 1


def test_a_mean_over_random_steps_is_that_of_its_steps():
    recipe = Recipe(**{**RECIPE, "graded_steps": "random"})
    settings = Settings(GUIDANCE, True)
    each = [student_turn(recipe, settings, step).total for step in (1, 2, 3)]
    assert cycle_cost(recipe, settings).student_turn.total == pytest.approx(sum(each) / 3)


def test_the_description_names_cycle_run_and_work():
    recipe, settings = published(5, max_steps=1000, batch_size=32)
    lines = describe_cost(recipe, settings, forward_flops=11.3e12)
    assert lines[0] == "DP-DMD: 69 forwards per sample and cycle: student turn 29, 5 turns of the fake score 40"
    assert lines[1].startswith("DP-DMD: 2,208,000 forwards in 1000 cycles of 32 samples, ")
    assert lines[1].endswith(" PFLOP at 11.3 TFLOP each")
