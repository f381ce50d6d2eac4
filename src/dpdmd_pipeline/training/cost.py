"""What a distillation costs before it is run: passes through the network, counted per sample.

One pass without gradient is the unit, F. A backward pass counts 2 F, a forward pass that gradient checkpointing
repeats 1 F more. With adapters a backward pass takes less, down to 1 F: the frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dpdmd_pipeline.training.recipe import Recipe

BACKWARD = 2  # F: one for the gradient of what goes in, one for that of the weights


@dataclass(frozen=True)
class Passes:
    """Passes through the network per sample; a guided call is two.

    Attributes:
        forward: asked for, with and without gradient.
        backward: of the same.
        repeated: forward passes that gradient checkpointing does again at backward.
    """

    forward: float = 0.0
    backward: float = 0.0
    repeated: float = 0.0

    @property
    def total(self) -> float:
        """All of them in F."""
        return self.forward + BACKWARD * self.backward + self.repeated

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward, self.repeated + other.repeated)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times, self.repeated * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Settings:
    """What the cost depends on besides the recipe.

    Attributes:
        guidance_scale: of the teacher; of its answers.
        gradient_checkpointing: of the trained networks.
        online_anchors: teacher steps K of the anchors that are computed in each student turn; empty: from a cache.
        with_denoised: whether the teacher's x0 at each of these is computed, too.
        teacher_steps: of the teacher's own sampling.
    """

    guidance_scale: float
    gradient_checkpointing: bool
    online_anchors: Sequence[int] = ()
    with_denoised: bool = False
    teacher_steps: int = 0

    def graded(self, forward: float, backward: float) -> Passes:
        """Each backward pass repeats its forward pass, where it was not kept."""
        return Passes(forward, backward, backward if self.gradient_checkpointing else 0)


def calls_of(guidance_scale: float) -> int:
    """Forward passes of one answer of the teacher."""
    return 1 if guidance_scale == 1 else 2


def anchor_passes(steps: Sequence[int], with_denoised: bool, guidance_scale: float) -> Passes:
    """One sample's anchors: the teacher walks to the last, and may be asked once more at each.

    Args:
        steps: rising teacher steps K.
    """
    walked = (steps[-1] if steps else 0) + len(steps) * with_denoised
    return Passes(walked * calls_of(guidance_scale))


def student_turn(recipe: Recipe, settings: Settings, graded_step: int | None) -> Passes:
    """One sample of a student turn, its anchors included where they are computed in it.

    Args:
        graded_step: the step that L_DMD trains, None for all; as `match_teacher` has it.
    """
    anchored = recipe.anchored_steps
    anchors = Passes()
    if anchored:
        anchors = anchor_passes(settings.online_anchors, settings.with_denoised, settings.guidance_scale)
    # a later one starts at the teacher's latents, and the student goes on from its own
    lessons = 2 * anchored - 1 if anchored else 0
    rest = (recipe.num_steps if graded_step is None else graded_step + 1) - anchored
    judged = calls_of(settings.guidance_scale) + 1  # by the teacher and by the fake score
    backward = anchored + _backward_of_dmd(recipe, graded_step)
    return anchors + settings.graded(lessons + rest + judged, backward)


def _backward_of_dmd(recipe: Recipe, graded_step: int | None) -> int:
    if graded_step is not None:
        return 1
    through_anchored = 0 if recipe.stop_gradient else recipe.anchored_steps
    return recipe.num_steps - recipe.anchored_steps + through_anchored


def graded_steps(recipe: Recipe) -> list[int | None]:
    """The steps that L_DMD may train, all equally often; [None] where each turn trains all of them."""
    if recipe.graded_steps == "all":
        return [None]
    steps = range(recipe.anchored_steps, recipe.num_steps)
    return [steps[-1]] if recipe.graded_steps == "last" else list(steps)


def fake_score_turn(recipe: Recipe, settings: Settings, *, draws: bool) -> Passes:
    """One sample of a fake-score turn.

    Args:
        draws: whether the student's picture is drawn for it, or an earlier turn's is used again.
    """
    return Passes(recipe.num_steps if draws else 0) + settings.graded(1, 1)


@dataclass(frozen=True)
class CycleCost:
    """Mean passes per sample of a recipe's turns.

    Attributes:
        student_turn: one, with its anchors where these are computed in it.
        fake_score_turns: all between two student turns.
        ratio: one measurement of the two gradients' norms, which `ratio_every` makes rare.
        warmup: the fake score's turns before the student's first, together.
    """

    student_turn: Passes
    fake_score_turns: Passes
    ratio: Passes
    warmup: Passes

    @property
    def cycle(self) -> Passes:
        """One student turn and the fake-score turns before it."""
        return self.student_turn + self.fake_score_turns


def cycle_cost(recipe: Recipe, settings: Settings) -> CycleCost:
    """What one student turn and its fake-score turns cost per sample; exact but for the mean over random steps."""
    turns = [student_turn(recipe, settings, step) for step in graded_steps(recipe)]
    mean = Passes(*(fmean(getattr(turn, kind) for turn in turns) for kind in ("forward", "backward", "repeated")))
    drawn = 1 if recipe.fake_rollout == "shared" else recipe.fake_score_turns
    fresh, again = (fake_score_turn(recipe, settings, draws=draws) for draws in (True, False))
    measured = recipe.anchored_steps + _backward_of_dmd(recipe, graded_steps(recipe)[0]) if recipe.anchored_steps else 0
    return CycleCost(
        student_turn=mean,
        fake_score_turns=drawn * fresh + (recipe.fake_score_turns - drawn) * again,
        ratio=settings.graded(0, measured),
        warmup=recipe.fake_score_warmup * fresh,
    )


def watch_cost(recipe: Recipe, settings: Settings) -> Passes:
    """All passes of a run's measurements: of the teacher's pictures once, of the student's at each watched turn.

    Of as many prompts as are asked for; with fewer training prompts there are fewer.
    """
    watch, calls = recipe.watch, calls_of(settings.guidance_scale)
    if not watch.every:
        return Passes()
    pictures, turns = watch.prompts * watch.images_per_prompt, -(-recipe.max_steps // watch.every)
    once, each = calls * (settings.teacher_steps + 1), recipe.num_steps + calls
    return Passes(pictures * (once + turns * each))


def describe_cost(recipe: Recipe, settings: Settings, forward_flops: float | None = None) -> list[str]:
    """Lines for the log before a run.

    Args:
        forward_flops: floating-point operations of one forward pass of one sample, if they are known.
    """
    cost = cycle_cost(recipe, settings)
    name = "DP-DMD" if recipe.anchored_steps else "DMD"
    samples = recipe.batch_size
    run = samples * (recipe.max_steps * cost.cycle.total + cost.warmup.total) + watch_cost(recipe, settings).total
    lines = [
        f"{name}: {cost.cycle.total:g} forwards per sample and cycle: student turn {cost.student_turn.total:g}, "
        f"{recipe.fake_score_turns} turns of the fake score {cost.fake_score_turns.total:g}",
        f"{name}: {run:,.0f} forwards in {recipe.max_steps} cycles of {samples} samples",
    ]
    if forward_flops is not None:
        lines[1] += f", {run * forward_flops / 1e15:,.3g} PFLOP at {forward_flops / 1e12:.3g} TFLOP each"
    return lines
