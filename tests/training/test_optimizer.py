"""AdamW gives the same update with every kernel, and from every saved state."""

import pytest
import torch
from tests.training.conftest import OPTIMIZER

from dpdmd_pipeline.training.optimizer import make_optimizer, norm_of_added_gradient
from dpdmd_pipeline.training.recipe import OptimizerRecipe

LAYOUTS = {"plain": torch.contiguous_format, "channels_last": torch.channels_last}


def begin(fused: bool, layout: str = "plain"):
    """A convolution's weight and its optimizer."""
    values = torch.randn(8, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(values.to(memory_format=LAYOUTS[layout]))
    return weight, make_optimizer([weight], OptimizerRecipe(**{**OPTIMIZER, "weight_decay": 0.1}), fused=fused)


def update(weight, optimizer, seeds) -> None:
    for seed in seeds:
        gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
        weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()


def test_a_fused_update_is_the_same_update():
    (plain, first), (fused, second) = begin(False), begin(True)
    update(plain, first, range(1, 6)), update(fused, second, range(1, 6))
    assert not torch.equal(plain, begin(False)[0])
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fused", [False, True])
def test_a_loaded_state_continues_with_this_runs_kernels_whatever_saved_it(fused, layout):
    expected, optimizer = begin(False)
    update(expected, optimizer, range(1, 6))
    (other,) = LAYOUTS.keys() - {layout}
    for saved_by in ({"fused": not fused}, {"fused": fused, "layout": other}):
        before, optimizer = begin(**saved_by)
        update(before, optimizer, range(1, 3))
        weight, resumed = begin(fused, layout)
        with torch.no_grad():
            weight.copy_(before)
        resumed.load_state_dict(optimizer.state_dict())
        assert bool(resumed.param_groups[0]["fused"]) == fused
        update(weight, resumed, range(3, 6))
        torch.testing.assert_close(weight.detach(), expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_measured_pass_adds_its_gradient_and_keeps_no_copy_of_it():
    weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(3)]
    inputs = [torch.randn(2, 64), torch.randn(2, 64)]

    def loss(number):
        return (inputs[number] @ weights[0] @ weights[1]).square().mean()  # the third weight has no gradient

    expected = [torch.autograd.grad(loss(number), weights[:2]) for number in range(2)]
    loss(0).backward()
    earlier = [weight.grad for weight in weights]
    norm = norm_of_added_gradient(loss(1).backward, weights, lambda grad: grad)
    assert norm == torch.stack([grad.norm() for grad in expected[1]]).norm()
    for weight, before, first, second in zip(weights, earlier, *expected, strict=False):
        assert weight.grad is before and torch.equal(before, first + second)  # added in place
    assert weights[2].grad is None and not weights[0]._backward_hooks
