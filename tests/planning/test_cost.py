"""The cost model against counted passes, and against the numbers of the published recipe."""

from dataclasses import astuple

import pytest
from tests.training.conftest import (
    ANCHOR_STEPS,
    DMD,
    GUIDANCE,
    NUM_STEPS,
    RECIPE,
    WATCHED,
    execution_with,
    recipe_with,
)

from dpdmd_pipeline.dpdmd.sampling import sample_seeds
from dpdmd_pipeline.planning.cost import (
    CycleCost,
    Passes,
    TeacherSettings,
    cycle_cost,
    describe_cycle,
    fake_score_update,
    graded_steps,
    student_update,
    watch_cost,
)
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import AdapterView

TEACHER = TeacherSettings(GUIDANCE, ANCHOR_STEPS, with_denoised=True, num_steps=NUM_STEPS)
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
    "guided_in_an_interval": {"guidance_interval": [0.3, 0.7]},
    "watched": WATCHED,
    "watched_every_cycle": {"watch": {**WATCHED["watch"], "every": 1, "images_per_prompt": 3}},
    "best_of_the_watched": {"watch": {**WATCHED["watch"], "keep": "best"}, "guidance_interval": [0.3, 0.7]},
    "lora_watched": {**WATCHED, "roles": "lora"},
    "lora": {"roles": "lora"},
    "lora_random_step": {"roles": "lora", "graded_steps": "random", "fake_rollout": "shared"},
}


class PassCounter:
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
    """Start to count, including the teacher that computes the anchors."""
    counters = []

    def begin(roles) -> PassCounter:
        counters.append(PassCounter(roles.teacher, roles.student, roles.fake_score, ask_teacher.teacher))
        return counters[-1]

    yield begin
    for handle in (handle for counter in counters for handle in counter.handles):
        handle.remove()


def expected_passes(recipe: Recipe, execution, cycles: int) -> Passes:
    """Passes of all samples of a run; comparing the gradients' norms takes none."""
    cost = cycle_cost(recipe, execution, TEACHER)
    steps = graded_steps(recipe)
    drawn = [
        steps[sample_seeds(recipe.seed, "student/graded_step", cycle, 1)[0] % len(steps)] for cycle in range(cycles)
    ]
    total = cost.warmup + cycles * cost.fake_score_updates
    for step in drawn:
        total += student_update(recipe, execution, TEACHER, step)
    return recipe.batch_size * total + watch_cost(recipe, TEACHER)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "repeated"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_passes_of_a_run_are_exactly_those_counted(start, count, tmp_path, variant, checkpointing):
    changes = {"max_steps": 2, **VARIANTS[variant]}
    roles, records = start(tmp_path, {"ratio_every": 2}, checkpointing, **changes)
    counter = count(roles)
    list(records)
    execution = execution_with(gradient_checkpointing=checkpointing)
    expected = expected_passes(recipe_with(**changes), execution, cycles=2)
    assert astuple(counter.passes) == astuple(expected)


def test_a_guided_call_costs_two_passes_in_one_batch_or_in_two(start, count, tmp_path):
    changes = {"max_steps": 1, "guidance_interval": [0.3, 0.7]}
    roles, records = start(tmp_path, {"ratio_every": 2, "guidance_batch": "apart"}, **changes)
    counter = count(roles)
    list(records)
    expected = expected_passes(recipe_with(**changes), execution_with(), cycles=1)
    assert astuple(counter.passes) == astuple(expected)


def test_micro_batches_cost_the_same(start, count, tmp_path):
    sizes = {"ratio_every": 1, "student_micro_batch": 3, "fake_score_micro_batch": 1}
    roles, records = start(tmp_path, sizes, batch_size=4, max_steps=1)
    counter = count(roles)
    list(records)
    cost = cycle_cost(recipe_with(batch_size=4, max_steps=1), execution_with(), TEACHER)
    assert astuple(counter.passes) == astuple(4 * cost.cycle)


def published_recipe(**changes) -> Recipe:
    return Recipe(**{**RECIPE, "fake_score_turns": 5, **changes})


def published_cost(anchor_steps: int, cached: bool = False, **changes) -> CycleCost:
    teacher = TeacherSettings(3.5, online_anchors=() if cached else [anchor_steps])
    return cycle_cost(published_recipe(**changes), execution_with(gradient_checkpointing=True), teacher)


@pytest.mark.parametrize("anchor_steps, student, cycle", [(5, 29, 69), (10, 39, 79)])
def test_the_published_recipe_costs_the_passes_of_its_own_loop(anchor_steps, student, cycle):
    cost = published_cost(anchor_steps)
    assert cost.student_update.total == student and cost.cycle.total == cycle
    execution = execution_with(gradient_checkpointing=True)
    assert fake_score_update(published_recipe(), execution, draws=True).total == 8


@pytest.mark.parametrize("anchor_steps, cycle", [(5, 69), (10, 79)])
def test_each_saving_is_the_one_that_follows_from_its_definition(anchor_steps, cycle):
    totals = {
        name: published_cost(anchor_steps, **changes).cycle.total
        for name, changes in {
            "cached": {"cached": True},
            "shared": {"fake_rollout": "shared"},
            "last": {"graded_steps": "last"},
        }.items()
    }
    # the teacher's guided rollout; four of five rollouts of four steps; two of three backward and repeated passes
    assert totals == {"cached": cycle - 2 * anchor_steps, "shared": cycle - 4 * 4, "last": cycle - 2 * 3}


def test_all_savings_together_leave_29_of_69():
    """Adapters take so little memory that no pass has to be repeated."""
    recipe = published_recipe(fake_rollout="shared", graded_steps="random")
    assert cycle_cost(recipe, execution_with(), TeacherSettings(3.5)).cycle.total == 29


def test_without_guidance_the_teacher_is_called_once():
    once, twice = (
        student_update(recipe_with(), execution_with(), TeacherSettings(scale, [5]), None).forward
        for scale in (1.0, 3.5)
    )
    assert twice - once == 5 + 1


def test_a_mean_over_random_steps_is_that_of_its_steps():
    options = recipe_with(graded_steps="random"), execution_with(gradient_checkpointing=True), TeacherSettings(GUIDANCE)
    totals = [student_update(*options, step).total for step in (1, 2, 3)]
    assert cycle_cost(*options).student_update.total == pytest.approx(sum(totals) / 3)


def test_the_description_of_a_cycle_names_its_parts():
    recipe, execution = published_recipe(max_steps=1000, batch_size=32), execution_with(gradient_checkpointing=True)
    line = describe_cycle(recipe, execution, TeacherSettings(3.5, [5]))
    assert line.startswith("DP-DMD: 69 ") and " 29," in line and line.endswith(" 40")
