"""Every family's network, sharded at its own blocks, computes the same as the whole one; in a group of one process."""

import pytest
import torch
import torch.distributed as dist
from tests.raising import refuses
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.training.roles import full_roles, trainable
from dpdmd_pipeline.training.sharding import groups, norm_of_added_shards, unsynced

TEACHERS = {
    "sd3": ("tiny_teacher", 0),
    "sdxl": ("tiny_sdxl", 0),
    "sana": ("tiny_sana", 7),
    "flux2_klein": ("tiny_flux2_klein", 100),
    "qwen_image": ("tiny_qwen_image", 200),
    "z_image": ("tiny_z_image", 40),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    """This process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'file'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.fixture
def family(request):
    def load(name):
        fixture, length = TEACHERS[name]
        options = {"resolution": 32, "max_sequence_length": length, "level_range": (0.02, 0.98)}
        return load_backbone(name, request.getfixturevalue(fixture), **options)

    return load


@pytest.fixture
def loss(family):
    """Loss of a family's network on the same two samples."""

    def loss_of(name, network, precision="float32"):
        backbone = family(name)
        cond = backbone.encode(["a red circle", "a blue square"])
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(2, *backbone.latent_shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            denoised = backbone.denoise(network, latents, backbone.schedule(4)[1], cond)
        return denoised.square().mean()

    return loss_of


def networks(backbone, precision="float32", checkpointing=False):
    """A plain and a sharded network; both start as the teacher."""
    plain = full_roles(backbone, gradient_checkpointing=checkpointing)
    sharded = full_roles(backbone, gradient_checkpointing=checkpointing, shard_in=precision)
    return plain.student, sharded.student


def gradients(network):
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in trainable(network)]


@pytest.mark.parametrize("name", TEACHERS)
def test_every_parameter_is_in_one_group_and_the_blocks_have_groups_of_their_own(family, name):
    network = family(name).load_model()
    parameters = groups(network).values()
    assert sorted(map(id, (p for group in parameters for p in group))) == sorted(map(id, network.parameters()))
    *inner, outside = (sum(p.numel() for p in group) for group in parameters)
    assert len(inner) > 1 and all(inner)
    assert 3 * sum(inner) > outside  # time embedders keep their real size in a tiny network


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", TEACHERS)
def test_a_sharded_network_has_the_loss_and_the_gradients_of_the_whole_one(family, loss, name, checkpointing):
    plain, sharded = networks(family(name), checkpointing=checkpointing)
    assert isinstance(sharded, FSDPModule) and all(isinstance(p, DTensor) for p in sharded.parameters())
    losses = [loss(name, network) for network in (plain, sharded)]
    for value in losses:
        value.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    for ours, theirs in zip(gradients(sharded), gradients(plain), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", TEACHERS)
def test_in_bfloat16_a_sharded_network_differs_by_rounding_and_its_gradients_are_float32(family, loss, name):
    plain, sharded = networks(family(name), "bfloat16")
    losses = [loss(name, network, "bfloat16") for network in (plain, sharded)]
    for value in losses:
        value.backward()
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)
    norms = [
        torch.stack([g.norm() for g in gradients(network) if g is not None]).norm() for network in (plain, sharded)
    ]
    assert norms[1].item() == pytest.approx(norms[0].item(), rel=0.05)
    assert {g.dtype for g in gradients(sharded) if g is not None} == {torch.float32}


def test_a_measured_pass_adds_its_gradient_and_has_the_norm_of_that_alone(family, loss):
    plain, sharded = networks(family("sd3"))
    expected = torch.autograd.grad(loss("sd3", plain), trainable(plain), allow_unused=True)
    loss("sd3", sharded).backward()
    before = [grad if grad is None else grad.clone() for grad in gradients(sharded)]
    norm = norm_of_added_shards((3 * loss("sd3", sharded)).backward, trainable(sharded))
    assert norm.item() == pytest.approx(3 * torch.stack([g.norm() for g in expected if g is not None]).norm().item())
    for ours, earlier in zip(gradients(sharded), before, strict=True):
        assert (ours is None) == (earlier is None)
        if ours is not None:
            torch.testing.assert_close(ours, 4 * earlier, rtol=1e-4, atol=1e-7)


def test_gradients_before_an_exchange_are_added_to_the_next(family, loss):
    plain, sharded = networks(family("sd3"))
    (3 * loss("sd3", plain)).backward()
    with unsynced(sharded):
        (2 * loss("sd3", sharded)).backward()
        assert all(p.grad is None for p in trainable(sharded))
    loss("sd3", sharded).backward()
    for ours, theirs in zip(gradients(sharded), gradients(plain), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_a_network_without_blocks_is_not_sharded():
    with refuses(ValueError, "VAE", "launch.sharding=none"):
        groups(_Blockless())


class _Blockless(torch.nn.Module):
    _no_split_modules, _repeated_blocks = None, []


_Blockless.__name__ = "VAE"
