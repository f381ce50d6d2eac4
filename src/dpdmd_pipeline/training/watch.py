"""Diversity and quality of a student while it trains, measured in latents: no image is decoded.

    latent_diversity    RMS distance between two latents of one prompt, mean over pairs and prompts; falls in a collapse
    correction          RMS change that the teacher makes to a re-noised latent; small if the teacher finds it likely

Both are measured with the same prompts and seeds each time, and once on the teacher's own samples (`*_teacher`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpdmd_pipeline.dpdmd.algorithm import student_pictures
from dpdmd_pipeline.dpdmd.noise import add_noise
from dpdmd_pipeline.dpdmd.sampling import rollout
from dpdmd_pipeline.training.draws import SampleDraws, micro_batches
from dpdmd_pipeline.training.recipe import Recipe, WatchRecipe
from dpdmd_pipeline.training.run import Run

# (rows of the prompts [B], batch indices) -> latents [B, C, H, W]
Draw = Callable[[Sequence[int], range], Tensor]
# (rows of the prompts [B], batch indices, latents) -> the teacher's x0 after re-noising them, [B, C, H, W]
Correct = Callable[[Sequence[int], range, Tensor], Tensor]


@dataclass
class Watch:
    """Prompts that are measured, the teacher's values, and the best cycle so far.

    The best cycle has the least correction among those with at least `diversity_floor` of the teacher's diversity.
    While there is none, it is the one with the largest diversity.

    Attributes:
        recipe: of the measurements.
        max_steps: cycles of the run.
        rows: of the prompts, each as often as it has images.
        teacher: latent_diversity and correction of the teacher; empty until measured.
        best: its rank and its number; empty until there is one.
    """

    recipe: WatchRecipe
    max_steps: int
    rows: list[int]
    teacher: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, recipe: Recipe, prompts: Sequence[int]) -> Watch:
        """Choose prompts evenly spread over the training prompts, or all if there are no more."""
        count = min(recipe.watch.prompts, len(prompts))
        chosen = [prompts[number * len(prompts) // count] for number in range(count)]
        rows = [row for row in chosen for _ in range(recipe.watch.images_per_prompt)]
        return cls(recipe.watch, recipe.max_steps, rows)

    def due(self, cycle: int) -> bool:
        """True if a cycle is followed by a measurement; the last one always is."""
        return (cycle + 1) % self.recipe.every == 0 or cycle + 1 == self.max_steps

    def is_best(self, cycle: int, diversity: float, correction: float) -> bool:
        """True if a cycle is better than all before; remembers it then."""
        diverse = diversity >= self.recipe.diversity_floor * self.teacher["latent_diversity"]
        rank = (1.0, -correction) if diverse else (0.0, diversity)
        if self.best and rank <= (self.best["enough"], self.best["value"]):
            return False
        self.best = {"enough": rank[0], "value": rank[1], "step": cycle + 1}
        return True

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {"of_teacher": self.teacher, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.teacher, self.best = dict(state["of_teacher"]), dict(state["best"])


def watch_cycle(run: Run, watch: Watch, cycle: int) -> tuple[dict[str, Tensor], bool]:
    """Measure the student after a cycle, and the teacher before the first measurement; every process draws everything.

    Returns:
        Scalars for the record; True if the recipe keeps the best cycle and this is the best so far.
    """
    device = run.accelerator.device
    if not watch.teacher:
        watch.teacher = _means(run, measure(watch, *_teacher_sampler(run)))
    measured, is_best = measure(watch, *_student_sampler(run)), False
    if watch.recipe.keep == "best":
        means = _means(run, measured)
        is_best = watch.is_best(cycle, means["latent_diversity"], means["correction"])
        measured["best_step"] = torch.tensor(int(watch.best["step"]), device=device)
    teacher = {f"{name}_teacher": torch.tensor(value, device=device) for name, value in watch.teacher.items()}
    return {**measured, **teacher}, is_best


@torch.no_grad()
def measure(watch: Watch, micro_batch: int, draw: Draw, correct: Correct) -> dict[str, Tensor]:
    """Latent diversity and correction, scalars.

    Args:
        watch: rows of the prompts.
        micro_batch: samples that go through a network at once.
        draw: sampler under measurement.
        correct: the teacher's x0 of re-noised samples.
    """
    latents, changes = [], []
    for indices in micro_batches(range(len(watch.rows)), micro_batch):
        rows = watch.rows[indices.start : indices.stop]
        samples = draw(rows, indices)
        latents.append(samples)
        changes.append((correct(rows, indices, samples) - samples).flatten(1).square().mean(1).sqrt())
    by_prompt = torch.cat(latents).unflatten(0, (-1, watch.recipe.images_per_prompt))
    return {"latent_diversity": mean_distance(by_prompt), "correction": torch.cat(changes).mean()}


def mean_distance(latents: Tensor) -> Tensor:
    """RMS distance between the samples of a group, mean over pairs and groups; a scalar.

    Args:
        latents: [groups, samples, ...], at least two samples.
    """
    flat = latents.flatten(2).float()
    count, size = flat.shape[1:]
    # From differences: torch's way by matrix products would round small distances away
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / size**0.5
    return distances.sum((1, 2)).mean() / (count * (count - 1))


def _student_sampler(run: Run) -> tuple[int, Draw, Correct]:
    def draw(rows: Sequence[int], indices: range) -> Tensor:
        draws, student = _draws(run, indices), run.denoiser(run.student, run.cond(rows))
        return student_pictures(student, draws.noise(), run.levels, draws.fresh())

    return run.execution.student_micro_batch, draw, _corrector(run)


def _teacher_sampler(run: Run) -> tuple[int, Draw, Correct]:
    def draw(rows: Sequence[int], indices: range) -> Tensor:
        return rollout(run.guided_teacher(run.cond(rows)), _draws(run, indices).noise(), run.data.teacher_levels)

    return run.execution.student_micro_batch, draw, _corrector(run)


def _corrector(run: Run) -> Correct:
    def correct(rows: Sequence[int], indices: range, latents: Tensor) -> Tensor:
        level = run.backbone.random_level(torch.full((len(rows),), run.recipe.watch.level))
        noisy = add_noise(latents, _draws(run, indices).noise("renoise"), level)
        return run.guided_teacher(run.cond(rows))(noisy, level)

    return correct


def _draws(run: Run, indices: range) -> SampleDraws:
    return run.draws.batch("watch", 0, indices)


def _means(run: Run, values: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, which must choose the same cycle although their roundings may differ."""
    return {name: run.accelerator.reduce(value, reduction="mean").item() for name, value in values.items()}
