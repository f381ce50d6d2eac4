"""Diversity and likeness to the teacher while a student learns, measured in latents: no picture is decoded.

    latent_diversity    RMS distance between two latents of one prompt, mean over pairs and prompts; a collapse falls
    correction          RMS change that the teacher makes to a latent after some noise; small where the student draws
                        what the teacher finds likely

Both are measured of the same prompts and seeds each time, and once of the teacher's own pictures (`*_teacher`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.training.recipe import Recipe

# (rows of the prompts [B], places of the samples) -> latents [B, C, H, W]
Draw = Callable[[Sequence[int], range], Tensor]
# The same with latents -> what the teacher makes of them after noise, [B, C, H, W]
Correct = Callable[[Sequence[int], range, Tensor], Tensor]


class Watch:
    """Measures at some turns, and remembers which of them was the best.

    The best is that with the least correction of those whose diversity is at least `diversity_floor` of the teacher's;
    as long as there is none, that with the largest diversity.

    Args:
        recipe: how often, of how many pictures.
        prompts: rows that are trained on; some are taken, evenly spread, or all where there are no more.
        part: pictures that go through a network at once.
    """

    def __init__(self, recipe: Recipe, prompts: Sequence[int], part: int) -> None:
        self.options, self.max_steps, self.part = recipe.watch, recipe.max_steps, part
        self._count = count = min(self.options.prompts, len(prompts))
        chosen = [prompts[number * len(prompts) // count] for number in range(count)]
        self._rows = [row for row in chosen for _ in range(self.options.images_per_prompt)]
        self.of_teacher: dict[str, float] = {}
        self._best: dict[str, float] = {}

    def due(self, step: int) -> bool:
        """Whether the turn at a step is followed by a measurement; the last always is."""
        return (step + 1) % self.options.every == 0 or step + 1 == self.max_steps

    @torch.no_grad()
    def measure(self, draw: Draw, correct: Correct) -> dict[str, Tensor]:
        """Both measures, scalars."""
        latents, changes = [], []
        for rows, places in self._parts():
            drawn = draw(rows, places)
            latents.append(drawn)
            changes.append((correct(rows, places, drawn) - drawn).flatten(1).square().mean(1).sqrt())
        together = torch.cat(latents).unflatten(0, (self._count, -1))
        return {"latent_diversity": mean_distance(together), "correction": torch.cat(changes).mean()}

    def _parts(self) -> Iterator[tuple[Sequence[int], range]]:
        for start in range(0, len(self._rows), self.part):
            places = range(start, min(start + self.part, len(self._rows)))
            yield self._rows[places.start : places.stop], places

    def is_best(self, step: int, diversity: float, correction: float) -> bool:
        """Take up a measurement; whether it is better than all before."""
        enough = diversity >= self.options.diversity_floor * self.of_teacher["latent_diversity"]
        rank = (1.0, -correction) if enough else (0.0, diversity)
        if self._best and rank <= (self._best["enough"], self._best["value"]):
            return False
        self._best = {"enough": rank[0], "value": rank[1], "step": step + 1}
        return True

    @property
    def best_step(self) -> int:
        """Number of the turn that was the best so far."""
        return int(self._best["step"])

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"of_teacher": self.of_teacher, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.of_teacher, self._best = dict(state["of_teacher"]), dict(state["best"])


def mean_distance(latents: Tensor) -> Tensor:
    """RMS distance between the samples of a group, mean over pairs and groups; a scalar.

    Args:
        latents: [groups, samples, ...], at least two samples.
    """
    flat = latents.flatten(2).float()
    count, size = flat.shape[1:]
    # of differences: torch's way by products of matrices would round away small ones
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / size**0.5
    return distances.sum((1, 2)).mean() / (count * (count - 1))


def kept_weights(weights: Sequence[nn.Parameter]) -> nn.ParameterList:
    """A copy, which later turns do not change; each process copies its shards."""
    return nn.ParameterList(weight.detach().clone() for weight in weights)
