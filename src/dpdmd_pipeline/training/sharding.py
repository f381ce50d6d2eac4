"""Trained networks sharded over the processes (torch's FSDP2): none holds all weights, gradients and moments of one.

A block's weights are gathered for its own computation and freed again (decision 0006). Any number of processes, sharded
or not, can load a checkpoint of shards (decision 0013).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from dpdmd_pipeline.training.recipe import Precision


def groups(network: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Modules at which a network is sharded, each with the parameters that are gathered when it is called.

    These are the blocks that diffusers declares indivisible, inner ones first. The last entry is the network itself,
    with the parameters outside of all blocks.

    Raises:
        ValueError: if the network's class names no blocks.
    """
    names = network._no_split_modules or network._repeated_blocks or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(network).__name__} names no blocks to shard it at: set train.launch.sharding=none")
    parameters, assigned = {}, set()
    for module in [*reversed(blocks), network]:
        own = [parameter for parameter in module.parameters() if parameter not in assigned]
        assigned.update(own)
        if own or module is network:
            parameters[module] = own
    return parameters


def shard(network: nn.Module, precision: Precision) -> None:
    """Shard a network of diffusers over all processes, in place; all of them must call this with the same weights.

    With bfloat16 a block's weights are gathered in bfloat16, as autocast would cast them; gradients are added up in
    float32.
    """
    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":  # autocast casts the inputs of a block, as without sharding
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # About a network's outputs, which are never changed in place here
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in groups(network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)


def is_sharded(network: nn.Module) -> bool:
    """True if `shard` was called on the network."""
    return isinstance(network, FSDPModule)


@contextmanager
def unsynced(network: FSDPModule) -> Iterator[None]:
    """Add gradients up in each process without an exchange; until the next exchange each process holds them whole."""
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def norm_of_added_shards(backward: Callable[[], object], parameters: Sequence[nn.Parameter]) -> Tensor:
    """Run a backward pass; returns the norm of the gradient that it adds, over all processes.

    Hooks on shards never run: FSDP2 itself sets their gradients. So the earlier ones, exchanged before, are put aside.
    The pass must not be `unsynced`, and no gradient of an earlier pass may still wait for its exchange.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    for parameter, grad in zip(parameters, before, strict=True):
        if grad is not None:
            parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
    return whole(norm)


def whole(value: Tensor) -> Tensor:
    """Gather a tensor that may be sharded; all processes must call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value
