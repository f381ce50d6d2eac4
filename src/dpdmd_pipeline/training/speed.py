"""What makes a run faster and changes its student by rounding only: compiled networks, memory formats, copies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dpdmd_pipeline.training.roles import Roles

Compile = Literal["none", "blocks", "whole"]

# Compiled code is kept per function and the same blocks serve up to three networks: with gradient and without, under
# each adapter, in a few sizes of batch (two, and those of the rollouts' parts). Beyond the limit torch quietly stops
# compiling; its own is 8.
_VERSIONS = 64


def speed_up(roles: Roles, *, compiled: Compile, channels_last: bool) -> None:
    """Prepare the networks behind the roles, in place: names and values of their weights stay.

    Args:
        roles: of one family.
        compiled: torch.compile of nothing, of the blocks that a network repeats, or of each whole network. Nothing is
            compiled before the first call.
        channels_last: lay the weights of convolutions out as tensor cores read them.

    Raises:
        ValueError: if there is no compiler, or if a network is not made of convolutions.
    """
    for network in roles.networks if channels_last else ():
        refuse_channels_last(type(network))
        nn.Module.to(network, memory_format=torch.channels_last)  # diffusers' own `to` warns of trained weights
    if compiled != "none":
        refuse_missing_compiler(next(roles.networks[0].parameters()).device)
        _compile([part for network in roles.networks for part in _parts(network, compiled)])


def _compile(parts: Sequence[nn.Module]) -> None:
    from torch._dynamo import config as dynamo
    from torch._functorch import config as functorch

    # A graph is gone through twice where a gradient's norm is measured: its buffers must outlive the first time.
    functorch.donated_buffer = False
    dynamo.recompile_limit = max(dynamo.recompile_limit, _VERSIONS)
    for part in parts:
        part.compile(dynamic=False)


def _parts(network: nn.Module, compiled: Compile) -> list[nn.Module]:
    """What is compiled, each by itself. diffusers' own `compile_repeated_blocks` knows the blocks of UNets alone."""
    if compiled == "whole":
        return [network]
    blocks = network._repeated_blocks or network._no_split_modules
    return [module for module in network.modules() if type(module).__name__ in blocks]


def refuse_channels_last(network: type[nn.Module]) -> None:
    """Transformers have next to no convolutions: their matrix products have no such layout.

    Raises:
        ValueError: names the class.
    """
    from diffusers import UNet2DConditionModel

    if not issubclass(network, UNet2DConditionModel):
        raise ValueError(
            f"train.channels_last=true is for the convolutions of a UNet, the teacher's network is a "
            f"{network.__name__}: set it to false"
        )


def refuse_missing_compiler(device: torch.device) -> None:
    """torch.compile writes code that a compiler of this machine must translate.

    Raises:
        ValueError: names what is missing.
    """
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        found = has_triton() and any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang")))
        needed = "triton and a C compiler"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        needed = "a C++ compiler"
        try:
            found = bool(get_cpp_compiler())
        except InvalidCxxCompiler:
            found = False
    if not found:
        raise ValueError(
            f"train.compile needs {needed} on {device.type}, torch finds none: install one (g++), or set compile=none"
        )


def onto(device: torch.device, tensor: Tensor) -> Tensor:
    """A copy on the device; a GPU is not waited for, since it reads from pages that stay where they are."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
