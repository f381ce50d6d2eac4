"""One base with two adapters behaves like three networks, at a third of the memory."""

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import LORA

from dpdmd_pipeline.backbones.base import conditioned
from dpdmd_pipeline.dpdmd.sampling import noise_from_seeds
from dpdmd_pipeline.training.recipe import LoraRecipe
from dpdmd_pipeline.training.roles import full_roles, lora_roles, trainable


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
