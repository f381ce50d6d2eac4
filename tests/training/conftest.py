"""A whole distillation in miniature: the real classes, random weights, a few samples per update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.training.anchors import OnlineAnchors, TeacherAnchors
from dpdmd_pipeline.training.checkpoint import Checkpoints
from dpdmd_pipeline.training.distill import distill
from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import Roles, make_roles
from dpdmd_pipeline.training.run import TrainingData

NUM_STEPS, GUIDANCE, ANCHOR_STEPS = 8, 3.5, [2, 4]
OPTIMIZER = {"kind": "adamw", "learning_rate": 1e-3, "betas": [0.9, 0.999], "weight_decay": 0.0, "max_grad_norm": 1.0}
LORA = {"student_rank": 4, "fake_score_rank": 2, "alpha_per_rank": 1.0, "targets": ["to_q", "to_v", "to_out.0"]}
LORA["base_weights"] = "as_teacher"
RECIPE = {
    "roles": "full",
    "lora": LORA,
    "precision": "float32",
    "start_from": None,
    "fake_score_from": "start",
    "seed": 3,
    "max_steps": 4,
    "warmup": 0,
    "decay": 0.5,
    "ema": 0.0,
    "batch_size": 2,
    "num_steps": 4,
    "grid": "shifted",
    "anchored_steps": 1,
    "diversity_weight": 1.0,
    "guidance_interval": [0.0, 1.0],
    "stop_gradient": True,
    "between_steps": "ode",
    "target": "secant",
    "space": "v",
    "normalizer": "noisy",
    "graded_steps": "all",
    "fake_score_turns": 2,
    "fake_score_warmup": 0,
    "fake_rollout": "fresh",
    "student": OPTIMIZER,
    "fake_score": OPTIMIZER,
    "watch": {
        "every": 0,
        "prompts": 2,
        "images_per_prompt": 2,
        "level": 0.4,
        "keep": "last",
        "diversity_floor": 0.9,
    },
}
WATCHED = {"watch": {**RECIPE["watch"], "every": 2}}
ALONE = {"processes": 1, "machines": 1, "rendezvous": None, "sharding": "none"}
EXECUTION = {
    "device": "cpu",
    "launch": ALONE,
    "gradient_checkpointing": False,
    "checkpoint_every": 2,
    "keep_last": 2,
    "log_every": 2,
    "previews": 0,
    "track": [],
    "checkpoint_minutes": 60,
    "checkpoint_background": True,
    "ratio_every": 2,
    "card_gib": None,
    "student_micro_batch": 2,
    "fake_score_micro_batch": 2,
    "rollout_micro_batch": 2,
    "guidance_batch": "joint",
    "compile": "none",
    "channels_last": False,
    "fused": False,
}
DMD = {"anchored_steps": 0, "diversity_weight": 0.0, "stop_gradient": False}


def recipe_with(**changes) -> Recipe:
    return Recipe(**{**RECIPE, **changes})


def execution_with(**changes) -> Execution:
    return Execution(**{**EXECUTION, **changes})


class InMemory:
    """Rows of tensors, like those of a cache."""

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
    return teacher_anchors(backbone, embeddings)


def teacher_anchors(backbone, embeddings: InMemory) -> TeacherAnchors:
    settings = {"num_steps": NUM_STEPS, "guidance_scale": GUIDANCE, "anchor_steps": ANCHOR_STEPS}
    return TeacherAnchors(backbone, backbone.load_model(), embeddings, with_denoised=True, **settings)


@pytest.fixture
def start(backbone, embeddings, ask_teacher):
    """Set up a run: (roles, records) of a recipe and a folder of checkpoints."""

    def start_run(
        folder: Path, execution: dict | None = None, checkpointing: bool = False, **changes
    ) -> tuple[Roles, Iterator[dict]]:
        recipe = recipe_with(**changes)
        anchored = recipe.anchored_steps
        draw = OnlineAnchors(ask_teacher, [0, 1, 2], seed=recipe.seed, anchored_steps=anchored)
        levels = backbone.schedule(NUM_STEPS)
        data = TrainingData(embeddings, [0, 1, 2], draw, ask_teacher.anchor_levels[:anchored], levels, GUIDANCE)
        roles = make_roles(backbone, recipe, gradient_checkpointing=checkpointing, sharded=False)
        checkpoints = Checkpoints(folder)
        options = execution_with(gradient_checkpointing=checkpointing, **(execution or {}))
        return roles, distill(backbone, roles, data, recipe, checkpoints, options)

    return start_run
