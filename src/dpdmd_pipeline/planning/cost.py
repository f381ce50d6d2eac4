"""Cost of a distillation before it runs: passes through the network, counted per sample.

The unit F is one pass without gradient. A backward pass counts 2 F; a forward pass repeated by gradient checkpointing
1 F more. With adapters a backward pass takes less, down to 1 F: the frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.recipe import AnchorRecipe, Recipe

BACKWARD = 2  # F: one for the gradient of the inputs, one for that of the weights


@dataclass(frozen=True)
class Passes:
    """Passes through the network per sample; a guided call is two."""

    forward: float = 0.0  # with and without gradient, before any repetition
    backward: float = 0.0  # backward passes of these
    repeated: float = 0.0  # forward passes that gradient checkpointing repeats in the backward pass

    @property
    def total(self) -> float:
        """All of them in F."""
        return self.forward + BACKWARD * self.backward + self.repeated

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.repeated + other.repeated)

    def __rmul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times, self.repeated * times)


@dataclass(frozen=True)
class TeacherSettings:
    """The teacher's part in the cost.

    Attributes:
        online_anchors: teacher steps K of the anchors that are computed in each student update; empty with a cache.
        with_denoised: True if the teacher's x0 at each of these is computed, too.
        num_steps: of the teacher's own sampling.
    """

    guidance_scale: float
    online_anchors: Sequence[int] = ()
    with_denoised: bool = False
    num_steps: int = 0


def calls_of(guidance_scale: float) -> int:
    """Forward passes of one guided call of the teacher."""
    return 1 if guidance_scale == 1 else 2


def anchored_prompts(prompts: int, options: AnchorRecipe, recipe: Recipe | None) -> tuple[int, int]:
    """Prompts in a cache of anchors, and anchors of each: all prompts, unless training draws fewer samples."""
    draws = recipe.max_steps * recipe.batch_size if recipe else prompts
    return (draws, 1) if draws < prompts else (prompts, options.seeds_per_prompt)


def anchor_passes(steps: Sequence[int], with_denoised: bool, guidance_scale: float) -> Passes:
    """Anchors of one sample: the teacher's rollout to the last of rising steps, and one call at each for its x0."""
    calls = (steps[-1] if steps else 0) + len(steps) * with_denoised
    return Passes(calls * calls_of(guidance_scale))


def student_update(recipe: Recipe, execution: Execution, teacher: TeacherSettings, graded_step: int | None) -> Passes:
    """One sample of a student update, including its anchors if they are computed online.

    Args:
        graded_step: step that L_DMD trains, None for all; see `match_teacher`.
    """
    anchored = recipe.anchored_steps
    steps = teacher.online_anchors if anchored else ()
    anchors = anchor_passes(steps, teacher.with_denoised, teacher.guidance_scale)
    # A later anchored step starts at the teacher's latents, and the student goes on from its own
    first = 2 * anchored - 1 if anchored else 0
    rest = (recipe.num_steps if graded_step is None else graded_step + 1) - anchored
    scores = calls_of(teacher.guidance_scale) + 1  # of the teacher and of the fake score
    backward = anchored + _backward_of_dmd(recipe, graded_step)
    return anchors + _graded(execution, first + rest + scores, backward)


def _graded(execution: Execution, forward: float, backward: float) -> Passes:
    """Passes with gradient; with checkpointing each backward pass repeats its forward pass."""
    return Passes(forward, backward, backward if execution.gradient_checkpointing else 0)


def _backward_of_dmd(recipe: Recipe, graded_step: int | None) -> int:
    if graded_step is not None:
        return 1
    through_anchored = 0 if recipe.stop_gradient else recipe.anchored_steps
    return recipe.num_steps - recipe.anchored_steps + through_anchored


def graded_steps(recipe: Recipe) -> list[int | None]:
    """Steps that L_DMD may train, all equally often; [None] if each update trains all of them."""
    if recipe.graded_steps == "all":
        return [None]
    steps = range(recipe.anchored_steps, recipe.num_steps)
    return [steps[-1]] if recipe.graded_steps == "last" else list(steps)


def fake_score_update(recipe: Recipe, execution: Execution, *, draws: bool) -> Passes:
    """One sample of a fake-score update; `draws` is False if it reuses the student's sample of an earlier update."""
    return Passes(recipe.num_steps if draws else 0) + _graded(execution, 1, 1)


@dataclass(frozen=True)
class CycleCost:
    """Mean passes per sample."""

    student_update: Passes  # including its anchors if they are computed online
    fake_score_updates: Passes  # all of one cycle
    warmup: Passes  # the fake-score updates before the first cycle, together

    @property
    def cycle(self) -> Passes:
        """The fake-score updates and the student update of one cycle."""
        return self.student_update + self.fake_score_updates


def cycle_cost(recipe: Recipe, execution: Execution, teacher: TeacherSettings) -> CycleCost:
    """Cost of a cycle per sample; exact, except that randomly graded steps enter by their mean."""
    updates = [student_update(recipe, execution, teacher, step) for step in graded_steps(recipe)]
    kinds = ("forward", "backward", "repeated")
    mean = Passes(*(fmean(getattr(update, kind) for update in updates) for kind in kinds))
    rollouts = 1 if recipe.fake_rollout == "shared" else recipe.fake_score_turns
    fresh, reused = (fake_score_update(recipe, execution, draws=draws) for draws in (True, False))
    return CycleCost(
        student_update=mean,
        fake_score_updates=rollouts * fresh + (recipe.fake_score_turns - rollouts) * reused,
        warmup=recipe.fake_score_warmup * fresh,
    )


def watch_cost(recipe: Recipe, teacher: TeacherSettings, prompts: int | None = None) -> Passes:
    """All passes of a run's measurements: the teacher's samples once, the student's at each measured cycle.

    `prompts` is the number of training prompts; None: at least `watch.prompts`.
    """
    watch = recipe.watch
    if not watch.every:
        return Passes()
    watched = watch.prompts if prompts is None else min(prompts, watch.prompts)
    samples, measurements = watched * watch.images_per_prompt, -(-recipe.max_steps // watch.every)
    calls = calls_of(teacher.guidance_scale)
    of_teacher, of_student = calls * (teacher.num_steps + 1), recipe.num_steps + calls
    return Passes(samples * (of_teacher + measurements * of_student))


def describe_cycle(recipe: Recipe, execution: Execution, teacher: TeacherSettings) -> str:
    """A line for the log before a run."""
    cost = cycle_cost(recipe, execution, teacher)
    return (
        f"{'DP-DMD' if recipe.anchored_steps else 'DMD'}: {cost.cycle.total:g} forwards per sample and cycle: "
        f"student update {cost.student_update.total:g}, "
        f"{recipe.fake_score_turns} fake-score updates {cost.fake_score_updates.total:g}"
    )
