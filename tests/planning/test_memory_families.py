"""Estimates of every family from its configs alone: shapes of embeddings, and memory of a pass."""

import shutil

import pytest
from tests.training.conftest import execution_with, recipe_with

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.planning.memory import MemoryModel
from dpdmd_pipeline.planning.weightless import conditioning_like
from dpdmd_pipeline.training.roles import full_roles

TEACHERS = {
    "sd3": ("tiny_teacher", 0),
    "sdxl": ("tiny_sdxl", 0),
    "sana": ("tiny_sana", 7),
    "flux2_klein": ("tiny_flux2_klein", 100),
    "qwen_image": ("tiny_qwen_image", 200),
    "z_image": ("tiny_z_image", 40),
}


@pytest.fixture
def family(request, tmp_path):
    """Adapter and folder of a family."""

    def load(name: str, *, weights: bool = True):
        teacher, length = TEACHERS[name]
        folder = request.getfixturevalue(teacher)
        if not weights:
            folder = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
        backbone = load_backbone(name, folder, resolution=32, max_sequence_length=length, level_range=(0.02, 0.98))
        return backbone, folder

    return load


def test_no_family_is_left_out():
    assert set(TEACHERS) == set(FAMILIES)


@pytest.mark.parametrize("name", TEACHERS)
def test_embeddings_have_the_shapes_given_by_the_configs(family, name):
    backbone, _ = family(name)
    real, like = backbone.encode([""]), conditioning_like(backbone)
    assert {key: (value.shape, value.dtype) for key, value in real.items()} == {
        key: (value.shape, value.dtype) for key, value in like.items()
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_a_family_is_estimated_from_its_configs(family, name):
    backbone, folder = family(name, weights=False)
    model = MemoryModel(backbone, folder, conditioning_like(backbone), 3.5)
    recipe = recipe_with(batch_size=16)
    sizes = dict.fromkeys(("student_micro_batch", "fake_score_micro_batch", "rollout_micro_batch"), 16)
    checkpointed, plain = (
        model.estimate(recipe, execution_with(gradient_checkpointing=checkpointing, **sizes)).activations
        for checkpointing in (True, False)
    )
    assert checkpointed < plain and model.forward_flops(recipe) > 0


@pytest.mark.parametrize("name", ["sdxl", "sana", "z_image"])
def test_weights_are_those_of_the_real_networks(family, name):
    backbone, folder = family(name)
    roles = full_roles(backbone, gradient_checkpointing=False)
    networks = (roles.teacher, roles.student, roles.fake_score)
    real = sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))
    model = MemoryModel(backbone, folder, conditioning_like(backbone), 3.5)
    assert model.estimate(recipe_with(), execution_with()).weights == real
