"""Trained networks cut over the processes (torch's FSDP2): no process holds all weights, gradients and moments of one.

A block's weights are brought together for its own computation and dropped again (decision 0006). What is written down
is always whole, so any number of processes, cut or not, takes it up.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor


def groups(network: nn.Module) -> dict[nn.Module, list[nn.Parameter]]:
    """Where a network is cut: modules, each with the parameters that are brought together when it is called.

    These are the blocks that diffusers says must not be split, inner ones first; the network itself, with what lies
    outside of all blocks, is the last.

    Raises:
        ValueError: if the network's class names no blocks.
    """
    names = network._no_split_modules or network._repeated_blocks or ()
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise ValueError(f"{type(network).__name__} names no blocks to cut it at: set train.launch.sharding=none")
    found, taken = {}, set()
    for module in [*reversed(blocks), network]:
        own = [parameter for parameter in module.parameters() if parameter not in taken]
        taken.update(own)
        if own or module is network:
            found[module] = own
    return found


def shard(network: nn.Module, precision: str) -> nn.Module:
    """Cut a network's weights over all processes, in place; all of them must call this with the same weights.

    Args:
        network: of diffusers, whole, on the device where it is to work.
        precision: of the arithmetic. In bfloat16 a block's weights are brought together in it, as autocast would cast
            them there; gradients are added up in float32.
    """
    device = next(network.parameters()).device.type
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":  # what goes into a block is left to autocast, as without sharding
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    # of what a network returns, which nobody here changes in place
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in groups(network):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    return network


def is_sharded(network: nn.Module) -> bool:
    return isinstance(network, FSDPModule)


@contextmanager
def unsynced(network: FSDPModule) -> Iterator[None]:
    """Gradients are added up in each process and not exchanged; until they are, each holds them whole."""
    network.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        network.set_requires_gradient_sync(True)


def gradient_norm(loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Norm of a loss's gradient, of all processes; gradients that have been exchanged before stay as they were.

    A sharded network's graph does not lead to its shards, so this is a backward pass like any other, which must not be
    `unsynced`; nor may one have been whose gradients still wait for their exchange.
    """
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    loss.backward(retain_graph=True)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad
    return whole(norm)


def whole(value: Tensor) -> Tensor:
    """A tensor of which each process may hold a shard; all must ask for it."""
    return value.full_tensor() if isinstance(value, DTensor) else value


# ---- states


def whole_state(state: Any, *, kept: bool) -> Any:
    """The state of a network or an optimizer with its shards brought together, one tensor at a time, on the CPU.

    All processes must ask for it. What is no shard stays what it is.

    Args:
        state: dictionaries of tensors and other things.
        kept: whether this process wants it; the others help, and get None for every sharded tensor.
    """
    if isinstance(state, Mapping):
        return {name: whole_state(value, kept=kept) for name, value in state.items()}
    if isinstance(state, DTensor):
        together = _gathered(state)
        return together.cpu() if kept else None
    return state


def _gathered(value: DTensor) -> Tensor:
    """The whole of a tensor whose rows are cut over the processes, by one exchange that is waited for in place.

    `full_tensor` does the same with an exchange that goes on beside the caller; over gloo it was once seen to end a
    process with a segmentation fault in the wait (torch 2.14).
    """
    if value.placements != (Shard(0),):
        return value.full_tensor()
    group, own = value.device_mesh.get_group(), value.to_local()
    processes, rows = dist.get_world_size(group), len(value)
    # torch.chunk cut the rows: all parts are alike but the last ones, which are shorter or empty
    padded = own.new_zeros(-(-rows // processes), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(processes)]
    dist.all_gather(parts, padded, group=group)
    return torch.cat(parts)[:rows]


def load_whole_state(target: Any, state: Mapping[str, Any]) -> None:
    """Take up a whole state, each process its shard; nothing is exchanged, so all must hold the same state.

    Args:
        target: a network or an optimizer, sharded or not, or anything with a state that is never sharded.
        state: its `state_dict`, as `whole_state` gives it.
    """
    if isinstance(target, nn.Module):
        own = target.state_dict()
        target.load_state_dict({name: _shard_like(own.get(name), value) for name, value in state.items()})
        return
    if not isinstance(target, torch.optim.Optimizer):
        target.load_state_dict(state)
        return
    parameters = [parameter for group in target.param_groups for parameter in group["params"]]
    moments = {
        number: {name: _copied(_shard_like(parameters[number], value)) for name, value in held.items()}
        for number, held in state["state"].items()
    }
    target.load_state_dict({**state, "state": moments})


def _copied(value: Any) -> Any:
    """An optimizer takes tensors as they are; those of a checkpoint are mapped from a file that will be deleted."""
    return value.clone() if isinstance(value, Tensor) else value


def _shard_like(own: Any, value: Any) -> Any:
    """This process's part of a whole tensor, cut as `own` is; what has another shape, as a counter, stays whole."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    return distribute_tensor(value.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
