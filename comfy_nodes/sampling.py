"""The re-noise sampler: predict x0, add fresh noise, repeat. Torch only; the deterministic one is ComfyUI's euler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from .noise import Streams, streams_of

AUTO = "auto"
DETERMINISTIC = "deterministic"
RENOISE = "re-noise"
METHODS = (DETERMINISTIC, RENOISE)


@torch.no_grad()
def sample_renoise(
    model: Callable[..., Tensor],
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict], None] | None = None,
    disable: bool | None = None,
    streams: Streams | None = None,
) -> Tensor:
    """Multistep x0 sampling with noise that belongs to each picture. The signature is k-diffusion's, for ComfyUI.

    ComfyUI's own `lcm` draws one stream per batch, on the GPU if there is one, and differently in each version.

    Args:
        model: (latents [B, C, H, W], sigma [B]) -> x0.
        x: latents at sigmas[0].
        sigmas: falling levels, [N + 1].
        extra_args: for the model; its `seed` defines the streams if `streams` is None.
        callback: receives each step, for progress and preview.
        disable: hide the progress bar.
        streams: noise of the pictures; its first draw is the start noise.

    Returns:
        Latents at sigmas[-1], [B, C, H, W]; x0 if that is 0.
    """
    extra_args = extra_args or {}
    streams = streams or streams_of(extra_args["seed"], len(x))
    streams.draw(x.shape[1:])  # skips the start noise, which x already holds
    add_noise = model.inner_model.inner_model.model_sampling.noise_scaling
    for step in trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[step] * x.new_ones(len(x)), **extra_args)
        if callback is not None:
            callback({"x": x, "i": step, "sigma": sigmas[step], "sigma_hat": sigmas[step], "denoised": denoised})
        x = denoised
        if sigmas[step + 1] > 0:
            x = add_noise(sigmas[step + 1], streams.draw(x.shape[1:]).to(x), denoised)
    return x
