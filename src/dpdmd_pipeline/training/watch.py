"""Diversity and quality of a student while it trains, measured in latents; pictures are decoded for people only.

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

from dpdmd_pipeline.backbones.base import Conditioning
from dpdmd_pipeline.dpdmd.algorithm import student_pictures
from dpdmd_pipeline.dpdmd.noise import add_noise
from dpdmd_pipeline.dpdmd.sampling import rollout
from dpdmd_pipeline.training.draws import SampleDraws, micro_batches
from dpdmd_pipeline.training.preview import decode_row
from dpdmd_pipeline.training.recipe import Recipe, WatchRecipe
from dpdmd_pipeline.training.run import Run

# (run, draws of B samples, embeddings of their prompts) -> latents [B, C, H, W]
Draw = Callable[[Run, SampleDraws, Conditioning], Tensor]


@dataclass
class Watch:
    """Prompts that are measured, the teacher's values, and the best cycle so far.

    The best cycle has the least correction among those with at least `diversity_floor` of the teacher's diversity.
    While there is none, it is the one with the largest diversity.
    """

    recipe: WatchRecipe
    max_steps: int  # cycles of the run
    rows: list[int]  # of the prompts, each as often as it has images
    teacher: dict[str, float] = field(default_factory=dict)  # its measurements; empty until measured
    best: dict[str, float] = field(default_factory=dict)  # rank and number of the best cycle; empty until there is one
    pictures: dict[int, Tensor] = field(default_factory=dict)  # rows to be saved, by cycle; 0 is the teacher's

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
        watch.teacher = _means(run, _measure_and_show(run, watch, _draw_teacher, 0))
    measured, is_best = _measure_and_show(run, watch, _draw_student, cycle + 1), False
    if watch.recipe.keep == "best":
        means = _means(run, measured)
        is_best = watch.is_best(cycle, means["latent_diversity"], means["correction"])
        measured["best_step"] = torch.tensor(int(watch.best["step"]), device=device)
    teacher = {f"{name}_teacher": torch.tensor(value, device=device) for name, value in watch.teacher.items()}
    return {**measured, **teacher}, is_best


def _measure_and_show(run: Run, watch: Watch, draw: Draw, cycle: int) -> dict[str, Tensor]:
    """Measure a sampler; the main process decodes what it drew for the first prompts."""
    latents: list[Tensor] = []

    def remembered(*arguments: Any) -> Tensor:
        latents.append(draw(*arguments))
        return latents[-1]

    values = measure(run, watch, remembered)
    if (count := run.execution.previews) and run.accelerator.is_main_process:
        by_prompt = torch.cat(latents).unflatten(0, (-1, watch.recipe.images_per_prompt))
        watch.pictures[cycle] = decode_row(run.backbone, by_prompt[:count])
    return values


@torch.no_grad()
def measure(run: Run, watch: Watch, draw: Draw) -> dict[str, Tensor]:
    """Latent diversity and correction of a sampler, scalars."""
    latents, changes = [], []
    for indices in micro_batches(range(len(watch.rows)), run.execution.student_micro_batch):
        draws, cond = run.draws.batch("watch", 0, indices), run.cond(watch.rows[indices.start : indices.stop])
        samples = draw(run, draws, cond)
        level = run.backbone.random_level(torch.full((len(indices),), watch.recipe.level))
        corrected = run.guided_teacher(cond)(add_noise(samples, draws.noise("renoise"), level), level)
        latents.append(samples)
        changes.append((corrected - samples).flatten(1).square().mean(1).sqrt())
    by_prompt = torch.cat(latents).unflatten(0, (-1, watch.recipe.images_per_prompt))
    return {"latent_diversity": mean_distance(by_prompt), "correction": torch.cat(changes).mean()}


def _draw_student(run: Run, draws: SampleDraws, cond: Conditioning) -> Tensor:
    return student_pictures(run.denoiser(run.student, cond), draws.noise(), run.levels, draws.fresh())


def _draw_teacher(run: Run, draws: SampleDraws, cond: Conditioning) -> Tensor:
    return rollout(run.guided_teacher(cond), draws.noise(), run.data.teacher_levels)


def mean_distance(latents: Tensor) -> Tensor:
    """RMS distance between the samples of a group [groups, samples, ...], mean over pairs and groups; a scalar."""
    flat = latents.flatten(2).float()
    count, size = flat.shape[1:]
    # From differences: torch's way by matrix products would round small distances away
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / size**0.5
    return distances.sum((1, 2)).mean() / (count * (count - 1))


def _means(run: Run, values: dict[str, Tensor]) -> dict[str, float]:
    """Means over the processes, which must choose the same cycle although their roundings may differ."""
    means = run.accelerator.reduce(torch.stack([*values.values()]), reduction="mean").tolist()
    return dict(zip(values, means, strict=True))
