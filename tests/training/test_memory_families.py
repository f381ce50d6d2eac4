"""The estimates know every family: shapes of embeddings, and what a pass keeps, from configs alone."""

import shutil

import pytest
from tests.backbones.conftest import edited, tiny_sana, tiny_sdxl  # noqa: F401
from tests.training.conftest import RECIPE

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.training.memory import MemoryModel, MemorySplit, conditioning_like
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.training.roles import full_roles

TEACHERS = {"sd3": ("tiny_teacher", 0), "sdxl": ("tiny_sdxl", 0), "sana": ("tiny_sana", 7)}


@pytest.fixture
def family(request, tmp_path):
    """Adapter and folder of a family."""

    def load(name: str, *, weights: bool = True):
        teacher, length = TEACHERS[name]
        folder = request.getfixturevalue(teacher)
        if not weights:
            folder = shutil.copytree(folder, tmp_path / "configs", ignore=shutil.ignore_patterns("*.safetensors"))
        backbone = load_backbone(name, folder, resolution=32, max_sequence_length=length, level_range=(0.02, 0.98))
        return backbone, folder, length

    return load


def test_no_family_is_left_out():
    assert set(TEACHERS) == set(FAMILIES)


@pytest.mark.parametrize("name", TEACHERS)
def test_embeddings_have_the_shapes_that_the_configs_tell(family, name):
    backbone, folder, length = family(name)
    real, like = backbone.encode([""]), conditioning_like(backbone)
    assert {key: (value.shape, value.dtype) for key, value in real.items()} == {
        key: (value.shape, value.dtype) for key, value in like.items()
    }


@pytest.mark.parametrize("name", TEACHERS)
def test_a_family_is_estimated_from_its_configs(family, name):
    backbone, folder, length = family(name, weights=False)
    model = MemoryModel(backbone, folder, conditioning_like(backbone), 3.5)
    recipe = Recipe(**{**RECIPE, "batch_size": 64})
    repeated, kept = (
        model.estimate(recipe, MemorySplit.alike(64, gradient_checkpointing=checkpointing))
        for checkpointing in (True, False)
    )
    assert repeated.activations < kept.activations and model.forward_flops(recipe) > 0


@pytest.mark.parametrize("name", ["sdxl", "sana"])
def test_weights_are_those_of_the_real_networks(family, name):
    backbone, folder, length = family(name)
    roles = full_roles(backbone, gradient_checkpointing=False)
    networks = (roles.teacher, roles.student, roles.fake_score)
    real = sum(t.nbytes for network in networks for t in (*network.parameters(), *network.buffers()))
    model = MemoryModel(backbone, folder, conditioning_like(backbone), 3.5)
    assert model.estimate(Recipe(**RECIPE), MemorySplit.alike(1, gradient_checkpointing=True)).weights == real
