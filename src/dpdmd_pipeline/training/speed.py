"""Compiled networks, memory formats and copies to a device: faster, and the same student but for rounding."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from dpdmd_pipeline.training.options import Execution
from dpdmd_pipeline.training.roles import Roles

# torch keeps compiled code per function, and the same blocks serve up to three networks: with gradient and without,
# under each adapter, in a few batch sizes. Beyond this limit torch quietly stops compiling; its own limit is 8.
_VERSIONS = 64


def speed_up(roles: Roles, execution: Execution, sizes: int = 1) -> None:
    """Set memory format and compilation of the networks, in place; names and values of their weights stay.

    `sizes` is the number of picture sizes, for each of which torch compiles anew.

    Raises:
        ValueError: if there is no compiler, or if a network is not made of convolutions.
    """
    if execution.channels_last:
        for network in roles.networks:
            refuse_channels_last(type(network))
            nn.Module.to(network, memory_format=torch.channels_last)  # diffusers' own `to` warns of trained weights
    if execution.compile != "none":
        refuse_missing_compiler(next(roles.networks[0].parameters()).device)
        _compile(roles.networks, sizes, whole=execution.compile == "whole")


def _compile(networks: Sequence[nn.Module], sizes: int, *, whole: bool) -> None:
    """Compile networks, or their repeated blocks. diffusers' `compile_repeated_blocks` knows those of UNets only."""
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    # Without stop-gradient both losses go back through one graph: its buffers must outlive the first time.
    functorch.donated_buffer = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, sizes * _VERSIONS)
    for network in networks:
        names = network._repeated_blocks or network._no_split_modules
        blocks = [module for module in network.modules() if type(module).__name__ in names]
        for module in [network] if whole else blocks:
            module.compile(dynamic=False)


def refuse_channels_last(network: type[nn.Module]) -> None:
    """Raise a ValueError for transformers, whose matrix products have no such layout."""
    from diffusers import UNet2DConditionModel

    if not issubclass(network, UNet2DConditionModel):
        raise ValueError(
            f"train.channels_last=true is for UNets, the teacher's network is a {network.__name__}: set it to false"
        )


def refuse_missing_compiler(device: torch.device) -> None:
    """Raise a ValueError if torch.compile has no compiler for the code that it writes."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        tools, usable = "triton and a C compiler", has_triton()
        usable = usable and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        tools, usable = "a C++ compiler", False
        with suppress(InvalidCxxCompiler):
            usable = bool(get_cpp_compiler())
    if not usable:
        raise ValueError(
            f"train.compile needs {tools} on {device.type}, torch finds none: install one (g++), or set compile=none"
        )


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """Copy to the device, through pinned memory and without waiting for a GPU."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
