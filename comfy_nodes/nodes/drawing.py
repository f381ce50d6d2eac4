"""Pictures of a guider, each with its own seed: shared by the nodes that draw more than one thing."""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_patcher
import comfy.samplers
import comfy.utils
import latent_preview
from torch import Tensor

from ..noise import BatchStream, ImageStreams, image_seeds
from .sampler import picture_by_picture, sampler_object


def prepare_pictures(model: comfy.model_patcher.ModelPatcher) -> comfy.model_patcher.ModelPatcher:
    """A clone whose pictures do not depend on their batch on a CPU; see `picture_by_picture`."""
    if model.load_device.type != "cpu":
        return model
    model = model.clone()
    model.model_options = picture_by_picture(model.model_options)
    return model


def draw(
    guider: comfy.samplers.CFGGuider,
    latent: dict,
    seed: int,
    method: str,
    per_image_seed: bool,
    sigmas: Tensor,
    *,
    calls: int | None = None,
    preview: bool = True,
) -> Tensor:
    """Latents [B, C, H, W] of a LATENT, sampled with progress.

    Args:
        seed: of picture 0.
        method: deterministic or re-noise.
        per_image_seed: draw the noise per picture, not per batch.
        calls: steps to show as progress; those of `sigmas` if None.
        preview: show the picture of every step in the node.
    """
    samples = latent["samples"]
    batch = (len(samples), latent.get("batch_index"))
    start, fresh = (
        ImageStreams(image_seeds(seed, *batch)) if per_image_seed else BatchStream(seed, *batch) for _ in range(2)
    )
    steps = calls or len(sigmas) - 1
    callback = latent_preview.prepare_callback(guider.model_patcher, steps) if preview else _progress(steps)
    return guider.sample(
        start.draw(samples.shape[1:]).to(samples.dtype),
        samples,
        sampler_object(method, fresh),
        sigmas,
        denoise_mask=latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )


def _progress(steps: int) -> Callable[..., None]:
    bar = comfy.utils.ProgressBar(steps)

    def show(step: int, _x0: Tensor, _x: Tensor, total_steps: int) -> None:
        bar.update_absolute(step + 1, total_steps)

    return show
