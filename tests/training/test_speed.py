"""Compiled networks and other memory formats train like plain ones, or are refused."""

import pytest
import torch
from tests.raising import refuses
from tests.training.conftest import InMemory, execution_with
from tests.training.test_roles import adapted, denoised
from torch import nn

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.student_file import save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.training.roles import Roles, full_roles, trainable
from dpdmd_pipeline.training.speed import refuse_missing_compiler, speed_up


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, latents):
        return latents + self.layer(latents).tanh()


class Network(nn.Module):
    """The attributes of a diffusers network that compiling reads."""

    _repeated_blocks: list[str] = []
    _no_split_modules = ["Block"]

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, latents):
        for block in self.blocks:
            latents = block(latents)
        return latents


@pytest.fixture
def quickly():
    """torch.compile without its last stage, the translation by a compiler, which takes a minute."""
    with torch.compiler.set_stance("default", force_backend="aot_eager"):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("compiled", ["blocks", "whole"])
def test_a_compiled_network_has_the_same_gradients_and_names_and_its_graph_may_be_retained(quickly, compiled):
    torch.manual_seed(0)
    network, latents = Network(), torch.randn(3, 4)
    parameters, names = list(network.parameters()), list(network.state_dict())
    expected = torch.autograd.grad(network(latents).square().mean(), parameters)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    speed_up(Roles(Network(), network, Network()), execution_with(compile=compiled))
    for retain in (False, True):  # the first backward pass decides what torch allows in later ones
        loss = network(latents).square().mean()
        grads = torch.autograd.grad(loss, parameters, retain_graph=retain)
        for ours, theirs in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert list(network.state_dict()) == names and list(network.parameters()) == parameters
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs


def test_compiled_blocks_are_repeated_under_the_adapter_of_their_forward_pass(backbone, embeddings, quickly):
    alone, roles = (adapted(backbone, gradient_checkpointing=checkpointing) for checkpointing in (False, True))
    expected = torch.autograd.grad(
        denoised(backbone, alone.student, embeddings).square().mean(), trainable(alone.student)
    )
    speed_up(roles, execution_with(compile="blocks"))
    loss = denoised(backbone, roles.student, embeddings).square().mean()
    with torch.no_grad():
        denoised(backbone, roles.fake_score, embeddings)
    for ours, theirs in zip(torch.autograd.grad(loss, trainable(roles.student)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_missing_compiler_is_refused():
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    facts = r"^train.compile.* C\+\+ .*cpu.*compile=none$"
    with config.patch({"cpp.cxx": ("/no/such/compiler",)}), pytest.raises(ValueError, match=facts):
        refuse_missing_compiler(torch.device("cpu"))


def test_a_unet_with_channels_last_is_the_same_unet_and_the_same_file(tiny_sdxl, tmp_path):
    family = load_backbone("sdxl", tiny_sdxl, resolution=32, max_sequence_length=0, level_range=(0.02, 0.98))
    plain, roles = (full_roles(family, gradient_checkpointing=False) for _ in range(2))
    before = list(roles.student.parameters())
    speed_up(roles, execution_with(channels_last=True))
    assert all(ours is theirs for ours, theirs in zip(roles.student.parameters(), before, strict=True))
    for network in roles.networks:
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    ours, expected = (
        denoised(family, each.student, InMemory(family.encode(["a red circle", "a blue square"])))
        for each in (roles, plain)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    ours.square().mean().backward()
    assert all(p.grad.stride() == p.stride() for p in roles.student.parameters())
    files = []
    for name, student in {"plain": plain.student, "channels_last": roles.student}.items():
        (tmp_path / name).mkdir()
        save_student(tmp_path / name, student, StudentHeader("sdxl", prediction="eps", timesteps=[999], resolution=32))
        files.append((tmp_path / name / WEIGHTS).read_bytes())
    assert files[0] == files[1]


def test_channels_last_is_refused_for_transformers(backbone):
    roles = full_roles(backbone, gradient_checkpointing=False)
    with refuses(ValueError, "train.channels_last=true", "SD3Transformer2DModel"):
        speed_up(roles, execution_with(channels_last=True))
