"""One base with two adapters behaves like three networks, at a third of the memory."""

from pathlib import Path

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import LORA, recipe_with

from dpdmd_pipeline.backbones.base import conditioned
from dpdmd_pipeline.backbones.start import Start
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds
from dpdmd_pipeline.training.recipe import LoraRecipe
from dpdmd_pipeline.training.roles import full_roles, lora_roles, make_roles, start_adapter, trainable


def adapted(backbone, *, gradient_checkpointing):
    """LoRA roles whose adapters already do something, the same on every call."""
    roles = lora_roles(backbone, LoraRecipe(**LORA), seed=0, gradient_checkpointing=gradient_checkpointing)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in [*trainable(roles.student), *trainable(roles.fake_score)]:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return roles


def denoised(backbone, model, embeddings):
    noise = noise_from_seeds([1, 2], backbone.latent_shape)
    return conditioned(backbone, model, embeddings.rows([0, 1]))(noise, backbone.schedule(4)[1])


def test_with_untrained_adapters_all_roles_are_the_teacher(backbone, embeddings):
    roles = lora_roles(backbone, LoraRecipe(**LORA), seed=0, gradient_checkpointing=False)
    expected = denoised(backbone, full_roles(backbone, gradient_checkpointing=False).teacher, embeddings)
    for role in (roles.teacher, roles.student, roles.fake_score, roles.teacher):
        assert torch.equal(denoised(backbone, role, embeddings), expected)


def test_adapters_act_on_their_own_role_only(backbone, embeddings):
    roles = adapted(backbone, gradient_checkpointing=False)
    with torch.no_grad():
        teacher, student, fake_score = (
            denoised(backbone, role, embeddings) for role in (roles.teacher, roles.student, roles.fake_score)
        )
        plain = denoised(backbone, backbone.load_model(), embeddings)
    assert torch.equal(teacher, plain)
    assert not torch.allclose(student, teacher, atol=1e-4) and not torch.allclose(student, fake_score, atol=1e-4)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_are_those_of_separate_copies_whichever_role_was_called_last(
    backbone, embeddings, gradient_checkpointing
):
    alone = adapted(backbone, gradient_checkpointing=False)
    expected = torch.autograd.grad(
        denoised(backbone, alone.student, embeddings).square().mean(), trainable(alone.student)
    )
    roles = adapted(backbone, gradient_checkpointing=gradient_checkpointing)
    loss = denoised(backbone, roles.student, embeddings).square().mean()
    for other in (roles.fake_score, roles.teacher):
        denoised(backbone, other, embeddings)
        grads = torch.autograd.grad(loss, trainable(roles.student), retain_graph=True)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)
        # and the role that was active before the backward pass is still active
        with torch.no_grad():
            assert torch.equal(
                denoised(backbone, roles.teacher, embeddings), denoised(backbone, alone.teacher, embeddings)
            )


def test_checkpointing_changes_no_gradient_of_full_networks(backbone, embeddings):
    grads = []
    for gradient_checkpointing in (False, True):
        student = full_roles(backbone, gradient_checkpointing=gradient_checkpointing).student
        loss = denoised(backbone, student, embeddings).square().mean()
        grads.append(torch.autograd.grad(loss, trainable(student), allow_unused=True))
    for plain, checkpointed in zip(*grads, strict=True):
        assert (plain is None) == (checkpointed is None)
        if plain is not None:
            torch.testing.assert_close(plain, checkpointed, rtol=1e-4, atol=1e-7)


def test_lora_roles_hold_one_network_and_a_quarter(backbone):
    one = sum(parameter.numel() for parameter in backbone.load_model().parameters())
    roles = lora_roles(backbone, LoraRecipe(**LORA), seed=0, gradient_checkpointing=False)
    base, _ = roles.teacher._shared
    numbers = {
        parameter.data_ptr(): parameter.numel()
        for role in (base, *vars(roles).values())
        for parameter in role.parameters()
    }
    assert one < sum(numbers.values()) <= 1.25 * one
    assert len(trainable(roles.teacher)) == 0 and len(trainable(roles.student)) > 0
    assert not {id(p) for p in trainable(roles.student)} & {id(p) for p in trainable(roles.fake_score)}


def foreign_start(backbone, rank, targets=("to_q", "to_out.0")):
    """A random LoRA of this rank, and the network with it."""
    network = backbone.load_model()
    layers = {n: m.weight for n, m in network.named_modules() if n.endswith(targets) and hasattr(m, "weight")}
    generator = torch.Generator().manual_seed(2)
    state = {}
    for name, weight in layers.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], generator=generator) / 4
        state[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, generator=generator) / 4
    start = Start(Path("lora.safetensors"), "sd3", state)
    start.load_into(network)
    return start, network


@pytest.mark.parametrize("roles", ["full", "lora"])
@pytest.mark.parametrize("fake_score_from", ["start", "teacher"])
def test_from_a_lora_of_no_larger_rank_the_roles_begin_as_the_network_with_it(
    backbone, embeddings, roles, fake_score_from
):
    start, network = foreign_start(backbone, rank=2)
    recipe = recipe_with(roles=roles, fake_score_from=fake_score_from, lora={**LORA, "alpha_per_rank": 0.5})
    made = make_roles(backbone, recipe, gradient_checkpointing=False, sharded=False, start=start)
    expected, plain = (denoised(backbone, model, embeddings) for model in (network, backbone.load_model()))
    assert not torch.allclose(expected, plain, atol=1e-3)
    for role in ("teacher", "student", "fake_score"):
        begins_there = role == "student" or (role, fake_score_from) == ("fake_score", "start")
        actual = denoised(backbone, getattr(made, role), embeddings)
        torch.testing.assert_close(actual, expected if begins_there else plain, rtol=0, atol=1e-5)


def test_an_adapter_that_has_no_room_for_its_start_is_refused_with_the_option(backbone):
    roles = lora_roles(backbone, LoraRecipe(**LORA), seed=0, gradient_checkpointing=False)
    start, _ = foreign_start(backbone, rank=3)
    with refuses(ValueError, "lora.fake_score_rank", "3"):  # it has 2
        start_adapter(roles.fake_score, start, 1.0)
    with refuses(ValueError, "lora.targets", "to_k"):
        start_adapter(roles.student, foreign_start(backbone, 1, ("to_k",))[0], 1.0)
    with refuses(ValueError, "roles=full"):
        start_adapter(roles.student, Start(Path("student.safetensors"), "sd3", None), 1.0)


def test_targets_that_match_nothing_are_refused(backbone):
    with refuses(ValueError, "lora.targets=['no_such_layer']"):
        lora_roles(backbone, LoraRecipe(**{**LORA, "targets": ["no_such_layer"]}), seed=0, gradient_checkpointing=False)


def test_an_adapters_state_is_that_of_peft(backbone):
    from peft import get_peft_model_state_dict

    roles = adapted(backbone, gradient_checkpointing=False)
    base, _ = roles.student._shared
    theirs = get_peft_model_state_dict(base, adapter_name="student", state_dict=base.state_dict())
    ours = roles.student.adapter_state()
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
