"""Adapters on a frozen base in 8 or 4 bits, by the real library: what it changes, what is trained, what is refused."""

import os
from copy import deepcopy
from importlib.util import find_spec

import pytest
import torch
from pydantic import ValidationError
from tests.pipelines.conftest import TRAIN, train_options
from tests.raising import refuses
from tests.training.conftest import GUIDANCE, LORA, execution_with, recipe_with, teacher_anchors

from dpdmd_pipeline.backbones.base import conditioned, load_backbone
from dpdmd_pipeline.backbones.quantised import plain_tensors, quantize, unpacking_bytes
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds
from dpdmd_pipeline.planning import checks
from dpdmd_pipeline.planning.memory import MemoryModel
from dpdmd_pipeline.planning.weightless import conditioning_like
from dpdmd_pipeline.training.recipe import LoraRecipe
from dpdmd_pipeline.training.roles import lora_roles, trainable

# CI runs these in another environment (.ci/extras): beside torchao, other libraries print what they lack at each start
with_torchao = pytest.mark.skipif(
    find_spec("torchao") is None and "QUANT_REQUIRED" not in os.environ, reason="torchao is not installed"
)
KINDS = ["fp8", "int8", "nf4"]
ERROR = {"fp8": 0.01, "int8": 0.002, "nf4": 0.03}  # at most, of what the untrained network predicts


@pytest.fixture(scope="session")
def backbone(world_teacher):
    """The embedded teacher: the layers of the smaller one are too small for nf4."""
    return load_backbone("sd3", world_teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))


@pytest.fixture(scope="session")
def ask_teacher(backbone, embeddings):
    return teacher_anchors(backbone, embeddings)


def roles_on(backbone, kind, **options):
    recipe = LoraRecipe(**LORA | {"base_weights": kind, "targets": ["to_q", "ff.net.2"]})
    return lora_roles(backbone, recipe, seed=0, gradient_checkpointing=False, **options)


def denoised(backbone, model, embeddings):
    noise = noise_from_seeds([1, 2], backbone.latent_shape)
    return conditioned(backbone, model, embeddings.rows([0, 1]))(noise, backbone.schedule(4)[1])


@with_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_fewer_bits_is_another_teacher_by_the_error_that_the_docs_name(backbone, embeddings, kind):
    with torch.no_grad():
        exact = denoised(backbone, backbone.load_model(), embeddings)
        changed = denoised(backbone, roles_on(backbone, kind).teacher, embeddings)
    predicted = exact - noise_from_seeds([1, 2], backbone.latent_shape)  # velocity times sigma
    assert ERROR[kind] / 20 < (changed - exact).norm() / predicted.norm() < ERROR[kind]


@with_torchao
def test_weights_that_the_network_does_not_use_stay_marked(backbone):
    network = backbone.load_model()
    unused = network.transformer_blocks[0].attn.to_q.weight.requires_grad_(False)
    quantize(network, "int8", "cpu")
    frozen = [name for name, weight in network.named_parameters() if not weight.requires_grad]
    assert not unused.requires_grad and frozen == ["transformer_blocks.0.attn.to_q.weight"]


@with_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradients_of_a_base_with_the_same_numbers_in_32_bits(backbone, embeddings, kind):
    roles = roles_on(backbone, kind)
    plain = deepcopy(backbone.load_model())
    for name, layer in roles.networks[0].named_modules():
        if isinstance(layer, torch.nn.Linear) and len([*plain_tensors(layer.weight)]) > 1:
            weight = layer.weight.dequantize() if hasattr(layer.weight, "qdata") else layer.weight.to(torch.float32)
            plain.get_submodule(name.replace(".base_layer", "")).weight.data = weight
    oracle = deepcopy(backbone)
    oracle.load_model = lambda **_: plain
    grads = []
    for made, family in ((roles, backbone), (roles_on(oracle, "as_teacher"), oracle)):
        weights = trainable(made.student)
        with torch.no_grad():
            for weight in weights:
                weight.fill_(0.02)
        loss = denoised(family, made.student, embeddings).square().mean()
        grads.append(torch.autograd.grad(loss, weights))
    for ours, theirs in zip(*grads, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


@with_torchao
@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_counts_the_bytes_of_the_base_that_is_loaded(backbone, world_teacher, kind):
    model = MemoryModel(backbone, world_teacher, conditioning_like(backbone), GUIDANCE, device="cpu")
    recipe = recipe_with(roles="lora", lora=LORA | {"base_weights": kind})
    network = lora_roles(backbone, recipe.lora, seed=0, gradient_checkpointing=False).networks[0]
    parts = [part for weight in (*network.parameters(), *network.buffers()) for part in plain_tensors(weight)]
    estimate = model.estimate(recipe, execution_with(gradient_checkpointing=True))
    assert estimate.weights == sum(part.untyped_storage().nbytes() for part in parts)
    assert estimate.weights < model.estimate(recipe_with(roles="lora"), execution_with()).weights
    numbers = max(weight.numel() for weight in network.parameters())
    assert unpacking_bytes(network) <= 14 * numbers


@with_torchao
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_training_on_fewer_bits_resumes_bit_for_bit(start, tmp_path, kind):
    changes = {"roles": "lora", "lora": LORA | {"base_weights": kind}, "max_steps": 2}
    whole, records = start(tmp_path / "whole", **changes)
    history = list(records)
    _, records = start(tmp_path / "stopped", **changes)
    next(records), records.close()
    resumed, records = start(tmp_path / "stopped", **changes)
    assert list(records) == history[1:]
    for ours, theirs in zip(trainable(resumed.student), trainable(whole.student), strict=True):
        assert torch.equal(ours, theirs)


@with_torchao
def test_layers_before_and_after_the_blocks_keep_their_bits(backbone):
    network = backbone.load_model().requires_grad_(False)
    quantize(network, "int8", "cpu")
    whole = {name for name, weight in network.named_parameters() if weight.dim() == 2 and weight.data_ptr()}
    assert {"proj_out.weight", "context_embedder.weight"} <= whole
    assert not any(name.startswith("transformer_blocks.0.attn.to_q") for name in whole)


# ---- refusals


@with_torchao
def test_a_network_whose_layers_do_not_fit_is_refused(tiny_teacher):
    options = {"resolution": 32, "max_sequence_length": 0, "level_range": (0.02, 0.98)}
    with refuses(ValueError, "base_weights=nf4", "16,384", "base_weights=as_teacher"):
        roles_on(load_backbone("sd3", tiny_teacher, **options), "nf4")


@pytest.mark.parametrize("option, value, remedy", [("roles", "full", "lora"), ("compile", "blocks", "none")])
def test_what_does_not_work_with_fewer_bits_is_refused_with_the_option(option, value, remedy):
    changes = {"roles": "lora", "lora": TRAIN["lora"] | {"base_weights": "nf4"}, option: value}
    with pytest.raises(ValidationError, match=f"base_weights=nf4.*{option}={value}.*{option}={remedy}"):
        train_options(**changes)


def test_a_missing_library_is_named_before_the_run(monkeypatch):
    options = train_options(roles="lora", lora=TRAIN["lora"] | {"base_weights": "int8"})
    monkeypatch.setattr(checks, "find_spec", lambda _: None)
    with refuses(ValueError, "lora.base_weights=int8", "torchao", "pip install", "as_teacher"):
        checks.check_base_weights(options)


def test_a_teacher_that_is_quantised_on_the_disk_is_refused(tiny_teacher, edited):
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    teacher = edited(tiny_teacher, "transformer/config.json", quantization_config=config)
    with refuses(ValueError, "bitsandbytes", "train.lora.base_weights"):
        load_backbone("sd3", teacher, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))
