"""A whole distillation in miniature: the real classes, random weights, a few samples a turn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.training.anchors import OnlineAnchors, TeacherAnchors
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.distill import Lessons, Roles, distill
from dpdmd_pipeline.training.recipe import Recipe

NUM_STEPS, GUIDANCE, ANCHOR_STEPS = 8, 3.5, [2, 4]
OPTIMIZER = {"learning_rate": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0, "max_grad_norm": 1.0}
RECIPE = {
    "seed": 3,
    "max_steps": 4,
    "decay": 0.5,
    "batch_size": 2,
    "num_steps": 4,
    "grid": "shifted",
    "anchored_steps": 1,
    "diversity_weight": 1.0,
    "stop_gradient": True,
    "target": "secant",
    "space": "v",
    "normalizer": "noisy",
    "fake_score_turns": 2,
    "student": OPTIMIZER,
    "fake_score": OPTIMIZER,
}
DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}


class InMemory:
    """Rows of tensors, as a cache gives them."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def rows(self, indices: Sequence[int]) -> dict[str, torch.Tensor]:
        return {name: value[list(indices)] for name, value in self.tensors.items()}


@pytest.fixture(scope="session")
def backbone(tiny_teacher: Path):
    return load_backbone("sd3", tiny_teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))


@pytest.fixture(scope="session")
def embeddings(backbone) -> InMemory:
    return InMemory(backbone.encode(["a red circle", "a blue square", "a green triangle", ""]))


@pytest.fixture(scope="session")
def ask_teacher(backbone, embeddings) -> TeacherAnchors:
    return TeacherAnchors(
        backbone,
        backbone.load_model(),
        embeddings,
        num_steps=NUM_STEPS,
        guidance_scale=GUIDANCE,
        anchor_steps=ANCHOR_STEPS,
        with_denoised=True,
    )


@pytest.fixture
def start(backbone, embeddings, ask_teacher):
    """Set up a run: (roles, records) of a recipe and a folder of checkpoints."""

    def start_run(folder: Path, **changes) -> tuple[Roles, Iterator[dict]]:
        recipe = Recipe(**{**RECIPE, **changes})
        anchored = recipe.anchored_steps
        draw = OnlineAnchors(
            ask_teacher, [0, 1, 2], seed=recipe.seed, batch_size=recipe.batch_size, anchored_steps=anchored
        )
        lessons = Lessons(embeddings, [0, 1, 2], draw, ask_teacher.anchor_levels[:anchored], GUIDANCE)
        roles = Roles(*(backbone.load_model() for _ in range(3)))
        kept = Checkpoints(folder)
        records = distill(backbone, roles, lessons, recipe, kept, kept.load_latest(), checkpoint_every=2, ratio_every=2)
        return roles, records

    return start_run
