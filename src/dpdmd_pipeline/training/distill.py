"""The loop of DP-DMD: fake-score turns and student turns, one record per step.

Every random draw is a function of (seed, purpose, step, sample): a resumed run repeats an uninterrupted
one bit for bit, and a sample's draws do not depend on the batch it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dpdmd_pipeline.backbones.base import Backbone, Conditioning, conditioned, guided
from dpdmd_pipeline.dpdmd.algorithm import fake_score_turn_loss, student_loss
from dpdmd_pipeline.dpdmd.anchor import AnchoredStep, anchored_steps
from dpdmd_pipeline.dpdmd.noise import NoiseLevel
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds, sample_seeds, uniform_from_seeds
from dpdmd_pipeline.training.anchors import AnchorBatch, Embeddings
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.recipe import OptimizerRecipe, Recipe

Record = dict[str, float]


DrawAnchors = Callable[[int], AnchorBatch]  # of a step number


@dataclass(frozen=True)
class Roles:
    """The three networks of one family; the teacher is frozen."""

    teacher: nn.Module
    student: nn.Module
    fake_score: nn.Module


@dataclass(frozen=True)
class Lessons:
    """What is learned from.

    Attributes:
        embeddings: of all prompts.
        prompts: rows that are trained on.
        draw_anchors: the student turn's samples at a step.
        anchor_levels: scalar level of each anchor.
        guidance_scale: of the teacher.
    """

    embeddings: Embeddings
    prompts: Sequence[int]
    draw_anchors: DrawAnchors
    anchor_levels: Sequence[NoiseLevel]
    guidance_scale: float


def distill(
    backbone: Backbone,
    roles: Roles,
    lessons: Lessons,
    recipe: Recipe,
    checkpoints: Checkpoints,
    resumed: tuple[int, dict[str, Any]] | None,
    *,
    checkpoint_every: int,
    ratio_every: int,
) -> Iterator[Record]:
    """Distil the teacher into `roles.student`; yields the record of each new step.

    Args:
        backbone: the family of the three networks.
        roles: trained in place.
        lessons: prompts and anchors.
        recipe: every number that changes the result.
        checkpoints: written to as the run goes.
        resumed: what `checkpoints.load_latest` found; its history goes into the next checkpoint.
        checkpoint_every: steps between checkpoints; also written when the consumer closes the generator.
        ratio_every: steps between measurements of the two gradients' norms (one more backward pass).

    Raises:
        ValueError: when a loss or a gradient is not finite, with the step and the prompts' rows.
    """
    accelerator = Accelerator(cpu=backbone.device.type == "cpu")
    run = _Run(backbone, roles, lessons, recipe, accelerator, ratio_every)
    done = saved = run.resume(resumed)
    between_steps = True
    try:
        for step in range(done, recipe.max_steps):
            between_steps = False
            record = run.step(step)
            run.history.append(record)
            done, between_steps = step + 1, True
            if done % checkpoint_every == 0 or done == recipe.max_steps:
                finished = done == recipe.max_steps
                checkpoints.save(done, run.state(finished), finished=finished)
                saved = done
            yield record
    finally:  # a closed generator: what was learned stays; a step broken off half-way would not repeat exactly
        if between_steps and done > saved:
            checkpoints.save(done, run.state(finished=False))


class _Run:
    """Networks, optimisers and history of one distillation: what a checkpoint holds."""

    def __init__(
        self,
        backbone: Backbone,
        roles: Roles,
        lessons: Lessons,
        recipe: Recipe,
        accelerator: Accelerator,
        ratio_every: int,
    ) -> None:
        self.backbone, self.lessons, self.recipe, self.accelerator = backbone, lessons, recipe, accelerator
        self.ratio_every = ratio_every
        self.levels = backbone.student_schedule(recipe.grid, recipe.num_steps)
        if recipe.anchored_steps and recipe.space == "eps" and self.levels[0].alpha == 0:
            raise ValueError("space=eps gives the first step of a flow model no weight at all: choose v or x0")
        self.teacher = roles.teacher.requires_grad_(False).eval()
        self.student, self.student_optimizer = accelerator.prepare(roles.student, _adamw(roles.student, recipe.student))
        self.fake_score, self.fake_score_optimizer = accelerator.prepare(
            roles.fake_score, _adamw(roles.fake_score, recipe.fake_score)
        )
        self.uncond = self._cond([len(lessons.embeddings) - 1])
        self.history: list[Record] = []

    def state(self, finished: bool) -> dict[str, Any]:
        """All that a continuation needs; a finished run keeps the student alone."""
        state = {"student": self.accelerator.unwrap_model(self.student).state_dict(), "history": self.history}
        if not finished:
            state["fake_score"] = self.accelerator.unwrap_model(self.fake_score).state_dict()
            state["student_optimizer"] = self.student_optimizer.state_dict()
            state["fake_score_optimizer"] = self.fake_score_optimizer.state_dict()
        return state

    def resume(self, found: tuple[int, dict[str, Any]] | None) -> int:
        """Continue from a checkpoint's state; returns the number of finished steps."""
        if found is None:
            return 0
        step, state = found
        self.history = list(state["history"])
        for name in state.keys() - {"history"}:
            thing = getattr(self, name)
            thing = self.accelerator.unwrap_model(thing) if isinstance(thing, nn.Module) else thing
            thing.load_state_dict(state[name])
        return step

    def step(self, step: int) -> Record:
        """`fake_score_turns` turns of the fake score, then one of the student."""
        turns = self.recipe.fake_score_turns
        fake = [self._fake_score_turn(step * turns + turn) for turn in range(turns)]
        record = {"step": step + 1, **self._student_turn(step)}
        record["fake_score_loss"] = sum(loss for loss, _ in fake) / turns
        record["fake_score_grad_norm"] = sum(norm for _, norm in fake) / turns
        return record

    def _fake_score_turn(self, turn: int) -> tuple[float, float]:
        draw = partial(self._seeds, "fake_score", turn)
        prompts = [self.lessons.prompts[seed % len(self.lessons.prompts)] for seed in draw("prompt")]
        cond = self._cond(prompts)
        loss = fake_score_turn_loss(
            conditioned(self.backbone, self.student, cond),
            conditioned(self.backbone, self.fake_score, cond),
            noise=self._noise(draw("noise")),
            levels=self.levels,
            renoise=self._noise(draw("renoise")),
            level=self.backbone.random_level(uniform_from_seeds(draw("level"))),
        )
        self._check("fake_score_loss", loss, turn // self.recipe.fake_score_turns, prompts)
        norm = self._update(self.fake_score, self.fake_score_optimizer, self.recipe.fake_score, loss)
        self._check("fake_score gradient", norm, turn // self.recipe.fake_score_turns, prompts)
        return loss.item(), norm.item()

    def _student_turn(self, step: int) -> Record:
        recipe, draw = self.recipe, partial(self._seeds, "student", step)
        batch = self.lessons.draw_anchors(step)
        cond = self._cond(batch.prompts)
        noise = batch.noise.to(self.accelerator.device)
        diversity, dmd = student_loss(
            conditioned(self.backbone, self.student, cond),
            guided(self.backbone, self.teacher, cond, self.uncond, self.lessons.guidance_scale),
            conditioned(self.backbone, self.fake_score, cond),
            noise=noise,
            anchored=self._anchored(noise, batch),
            levels=self.levels,
            renoise=self._noise(draw("renoise")),
            level=self.backbone.random_level(uniform_from_seeds(draw("level"))),
            stop_gradient=recipe.stop_gradient,
            normalizer=recipe.normalizer,
            space=recipe.space,
        )
        total = dmd + recipe.diversity_weight * diversity
        self._check("student loss", total, step, batch.prompts)
        ratio = self._gradient_ratio(step, diversity, dmd)
        for group in self.student_optimizer.param_groups:
            group["lr"] = recipe.student.learning_rate * self._decay(step)
        norm = self._update(self.student, self.student_optimizer, recipe.student, total)
        self._check("student gradient", norm, step, batch.prompts)
        record = {"dmd_loss": dmd.item(), "diversity_loss": diversity.item(), "student_grad_norm": norm.item()}
        return record if ratio is None else {**record, "grad_ratio": ratio}

    def _decay(self, step: int) -> float:
        """Share of the student's learning rate at a step; a function of the step alone, so resuming needs no state."""
        falling = self.recipe.decay * self.recipe.max_steps
        return min(1.0, (self.recipe.max_steps - step) / falling) if falling else 1.0

    def _anchored(self, noise: Tensor, batch: AnchorBatch) -> list[AnchoredStep]:
        device = self.accelerator.device
        lessons = anchored_steps(
            noise, [anchor.to(device) for anchor in batch.anchors], self.levels[0], self.lessons.anchor_levels
        )
        if self.recipe.target == "secant":
            return lessons
        return [lesson._replace(target=x0.to(device)) for lesson, x0 in zip(lessons, batch.denoised, strict=True)]

    def _gradient_ratio(self, step: int, diversity: Tensor, dmd: Tensor) -> float | None:
        """|lambda grad L_div| / |grad L_DMD| in the student's weights, on some steps: lambda is read off it."""
        if step % self.ratio_every or not diversity.requires_grad:
            return None
        parameters = [p for p in self.student.parameters() if p.requires_grad]
        norms = [
            torch.nn.utils.get_total_norm(
                [
                    g
                    for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                    if g is not None
                ]
            )
            for loss in (diversity, dmd)
        ]
        return self.recipe.diversity_weight * (norms[0] / norms[1]).item()

    def _update(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, recipe: OptimizerRecipe, loss: Tensor
    ) -> Tensor:
        self.accelerator.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def _seeds(self, role: str, turn: int, purpose: str) -> list[int]:
        return sample_seeds(self.recipe.seed, f"{role}/{purpose}", turn, self.recipe.batch_size)

    def _noise(self, seeds: Sequence[int]) -> Tensor:
        return noise_from_seeds(seeds, self.backbone.latent_shape).to(self.accelerator.device)

    def _cond(self, prompts: Sequence[int]) -> Conditioning:
        return {
            name: value.to(self.accelerator.device) for name, value in self.lessons.embeddings.rows(prompts).items()
        }

    def _check(self, name: str, value: Tensor, step: int, prompts: Sequence[int]) -> None:
        if not value.isfinite():
            rates = f"student {self.recipe.student.learning_rate}, fake score {self.recipe.fake_score.learning_rate}"
            raise ValueError(
                f"{name} is {value.item()} at step {step + 1}, prompts {sorted(set(prompts))}: "
                f"lower the learning rate ({rates})"
            )


def _adamw(model: nn.Module, recipe: OptimizerRecipe) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay
    )
