"""The protocol of a model family, the parts that families share, and how a family is loaded and guided."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, Self

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.networks import load_network, network_config
from dpdmd_pipeline.backbones.options import BaseWeights
from dpdmd_pipeline.backbones.quantised import quantize
from dpdmd_pipeline.backbones.sizes import PictureSize, Resolution, check_divides, sizes_of
from dpdmd_pipeline.backbones.texts import Conditioning, TokenLimit
from dpdmd_pipeline.dpdmd.noise import NoiseLevel, flow_student_schedule, noise_share, random_flow_level
from dpdmd_pipeline.dpdmd.sampling import Denoise
from dpdmd_pipeline.limits import MAX_SIZE, first_names, read_json

GuidanceBatch = Literal["joint", "apart"]
EVERY_LEVEL = (0.0, 1.0)  # as a guidance interval


class Backbone(Protocol):
    """A family of text-to-image models, seen as denoisers that return x0.

    The network is an argument, since teacher, student and fake score are three networks of one family.
    """

    folder: Path  # the teacher's
    sizes: list[PictureSize]  # of pictures, in pixels; the first one is that of this adapter
    latent_shape: tuple[int, int, int]  # (C, H, W)
    device: torch.device  # of networks, embeddings and levels
    dtype: torch.dtype  # of the networks, and of the embeddings
    prediction: str  # output of the network: flow (velocity), eps or v (v-prediction)

    def at(self, size: PictureSize) -> Self:
        """This adapter for pictures of another size: other latents, and other levels where the family shifts them."""

    def load_model(
        self, folder: Path | None = None, *, float32: bool = False, weights: BaseWeights = "as_teacher"
    ) -> nn.Module:
        """Load the network of the teacher or, with a folder, of a student: in `dtype`, or in float32 for training.

        With `weights` its linear layers are stored in fewer bits (see `quantize`): it is then for a frozen network.
        """

    def empty_model(self) -> nn.Module:
        """The network without weights, on the meta device."""

    def schedule(self, num_steps: int) -> NoiseLevel:
        """The teacher's own sampling schedule, [num_steps + 1]: noisiest first, clean last."""

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        """A student's schedule, on a named grid or on explicit levels: sigmas of flow, timesteps of diffusion."""

    def random_level(self, uniform: Tensor) -> NoiseLevel:
        """Per-sample levels [B, 1, 1, 1] for DMD and the fake score, from uniform numbers [B] in [0, 1)."""

    def encode(self, prompts: list[str]) -> Conditioning:
        """Embeddings of prompts, all of one shape (see `padded`); of [""] for the unconditional branch."""

    def conditioning_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one prompt's embeddings, as `encode` names them, without the batch; reads configs only."""

    def denoise(self, model: nn.Module, latents: Tensor, level: NoiseLevel, cond: Conditioning) -> Tensor:
        """x0 in float32, [B, C, H, W]."""

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float, latents: Tensor, level: NoiseLevel) -> Tensor:
        """Classifier-free guidance of predictions at the latents' level; 1 is none (see `guidance_arguments`)."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images in [0, 1], [B, 3, H, W]."""

    def distilled(self) -> str | None:
        """The fact that shows that the folder holds a few-step student and no teacher; None if none does."""


def load_backbone(family: str, folder: Path, **options: Any) -> Backbone:
    """Load the adapter of a family for a teacher's pipeline directory; weights are read on use.

    Raises:
        ValueError: if the family is unknown, or the folder does not fit it or the options.
    """
    module = _module(family)
    _hide_progress_bars()
    return module.load(folder, **options)


def pipeline_class(family: str) -> Any:
    """diffusers' pipeline of a family."""
    return _module(family).load.pipeline_class


def teacher_grid(family: str) -> str | None:
    """Name of the grid of a flow family's own schedule, in `flow_sigmas`; None for diffusion models."""
    return getattr(_module(family).load, "grid", None)


def guidance_arguments(family: str, scale: float) -> dict[str, Any]:
    """Arguments of the family's pipeline call for a guidance scale; 1 is none in all families."""
    return _module(family).load.guidance_arguments(scale)


def token_limits(family: str, folder: Path, max_sequence_length: int) -> dict[str, TokenLimit]:
    """Limits of a teacher's tokenizers, by the names of their folders; reads their configs only."""
    return _module(family).token_limits(folder, max_sequence_length)


def _module(family: str) -> Any:
    if family not in FAMILIES:
        raise ValueError(f"backbone.family is {family!r}: choose one of {', '.join(FAMILIES)}")
    return importlib.import_module(f"dpdmd_pipeline.backbones.{family}")


def _hide_progress_bars() -> None:
    """Disable the bars of diffusers and transformers: they draw one for every component they load."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def load_quietly() -> Iterator[None]:
    """Silence warnings and progress bars of diffusers and transformers."""
    import diffusers
    import transformers

    libraries = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in libraries]
    _hide_progress_bars()
    try:
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)


# ---- shared by families


class PipelineBackbone:
    """Options, components and guidance of a backbone over a diffusers pipeline directory; see `BackboneOptions`."""

    pipeline_class: Any  # of diffusers; its signature names the components and their classes
    component: str  # folder of the denoising network
    network_class: Any  # of diffusers
    autoencoder_class: Any  # of diffusers

    def __init__(
        self,
        folder: Path,
        *,
        resolution: Resolution,
        max_sequence_length: int,
        level_range: tuple[float, float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.folder, self.dtype, self.device = Path(folder), dtype, torch.device(device)
        self.sizes, self.max_sequence_length, self.level_range = sizes_of(resolution), max_sequence_length, level_range
        self._config = network_config(self.network_class, self.folder / self.component)
        vae = self.autoencoder_class.load_config(self.folder, subfolder="vae")
        self._channels, self._pixels, self._patch = self._latent_sizes(vae)
        self.latent_shape, *_ = [self._latent_shape(size, "backbone.resolution") for size in self.sizes]

    def at(self, size: PictureSize) -> Self:
        other = copy(self)
        other.sizes, other.latent_shape = [size], self._latent_shape(size, "size")
        return other

    def load_model(
        self, folder: Path | None = None, *, float32: bool = False, weights: BaseWeights = "as_teacher"
    ) -> nn.Module:
        dtype = torch.float32 if float32 else self.dtype
        network = load_network(self.network_class, Path(folder or self.folder / self.component), dtype)
        if weights != "as_teacher":
            quantize(network, weights, self.device)  # layer by layer: the whole network may be too large for the device
        return network.to(self.device)

    def empty_model(self) -> nn.Module:
        with torch.device("meta"):
            return self.network_class.from_config(self._config)

    def guide(self, cond_x0: Tensor, uncond_x0: Tensor, scale: float, latents: Tensor, level: NoiseLevel) -> Tensor:
        return uncond_x0 + scale * (cond_x0 - uncond_x0)

    @staticmethod
    def guidance_arguments(scale: float) -> dict[str, Any]:
        return {"guidance_scale": scale}

    def distilled(self) -> str | None:
        return None

    def _latent_shape(self, size: PictureSize, option: str) -> tuple[int, int, int]:
        """Shape (C, H, W) of the latents of a picture size, which must divide into the network's patches."""
        check_divides(option, size, self._pixels * self._patch, self._largest_side())
        return self._channels, size[0] // self._pixels, size[1] // self._pixels

    def _largest_side(self) -> int:
        """Most pixels along a side, for a network with a table of positions."""
        return MAX_SIZE

    def _latent_sizes(self, vae: Mapping[str, Any]) -> tuple[int, int, int]:
        """Channels, pixels of the picture per latent pixel along one side, latent pixels per patch along one side."""
        blocks = vae.get("block_out_channels") or vae["encoder_block_out_channels"]
        return self._config["in_channels"], 2 ** (len(blocks) - 1), self._config.get("patch_size", 1)

    def _check_sequence_length(self, most: int) -> None:
        """Check that prompts have at least one token and no more than the pipeline takes."""
        if not 0 < self.max_sequence_length <= most:
            raise ValueError(
                f"backbone.max_sequence_length is {self.max_sequence_length}: "
                f"{self.pipeline_class.__name__} takes 1 to {most}"
            )

    def _check_text_width(self, width: int) -> None:
        """Check that the text encoder's embeddings have the width that the network takes."""
        config = read_json(self.folder / "text_encoder" / "config.json")
        hidden = config.get("text_config", config)["hidden_size"]
        if hidden != width:
            raise ValueError(
                f"{self.folder}: the text encoder has embeddings of {hidden} numbers, the transformer takes {width}: "
                "give the text encoder that belongs to the teacher"
            )

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        config = self._vae.config
        raw = latents / config.scaling_factor
        if config.get("latents_mean") and config.get("latents_std"):  # in some models derived from SDXL
            mean, std = (raw.new_tensor(value).view(1, -1, 1, 1) for value in (config.latents_mean, config.latents_std))
            raw = raw * std + mean
        if config.get("shift_factor"):
            raw = raw + config.shift_factor
        return (self._vae.decode(raw).sample / 2 + 0.5).clamp(0, 1)

    @cached_property
    def _vae(self) -> nn.Module:
        """The autoencoder, frozen and in float32: SDXL's overflows in float16."""
        return load_part(self.autoencoder_class, self.folder / "vae", torch.float32).to(self.device)

    def _load_text(self, **components: Any) -> Any:
        """Load the pipeline with frozen text encoders, without the autoencoder and with these other components."""
        for name, kind in self.pipeline_class.load_config(self.folder).items():
            if name.startswith("text_encoder") and name not in components and kind[1]:
                components[name] = load_part(class_of(*kind), self.folder / name, self.dtype).to(self.device)
        return self.pipeline_class.from_pretrained(self.folder, vae=None, dtype=self.dtype, **components)


def class_of(library: str, name: str) -> Any:
    """A class that a pipeline's index names."""
    return getattr(importlib.import_module(library), name)


def load_part(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load a frozen text encoder or autoencoder.

    Raises:
        ValueError: if weights are missing; the libraries only warn, and draw them at random.
    """
    with load_quietly():
        part, info = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights ({first_names(missing)}): download or save it again")
    return part.requires_grad_(False)


class FlowBackbone(PipelineBackbone):
    """Levels of a flow model; the shift may depend on the picture's size and on the number of sampling steps."""

    prediction = "flow"
    grid = "diffusers"  # of the teacher's own schedule, in `flow_sigmas`; shifted if the pipeline computes the sigmas

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self._scheduler = read_json(self.folder / "scheduler" / "scheduler_config.json")
        self.shift = self._shift()

    def at(self, size: PictureSize) -> Self:
        other = super().at(size)
        other.shift = other._shift()
        return other

    def schedule(self, num_steps: int) -> NoiseLevel:
        return self.student_schedule(self.grid, num_steps)

    def student_schedule(self, grid: str | list[float], num_steps: int) -> NoiseLevel:
        terminal = self._scheduler.get("shift_terminal")
        return flow_student_schedule(grid, num_steps, self._shift(num_steps), terminal).to(self.device)

    def _shift(self, num_steps: int | None = None) -> float:
        """Shift of a schedule of `num_steps`; without a number, that of random levels and of the header.

        A family whose pipeline computes the shift overrides this where the scheduler has use_dynamic_shifting: the
        scheduler of an exported student has a static one.
        """
        return static_shift(self._scheduler, self.folder)

    def _dynamic_shift(self, mu: float) -> float:
        """Shift of a scheduler with use_dynamic_shifting, for the mu that its pipeline computes."""
        return math.exp(mu) if self._scheduler.get("time_shift_type", "exponential") == "exponential" else mu

    def random_level(self, uniform: Tensor) -> NoiseLevel:
        return random_flow_level(uniform, self.level_range, self.shift).to(self.device)


def static_shift(scheduler: Mapping[str, Any], teacher: Path | str = "the teacher") -> float:
    """Shift in the scheduler config of a flow model, under either of diffusers' names.

    Raises:
        ValueError: if there is none, or if it depends on the resolution.
    """
    shift = scheduler.get("shift")
    if shift is None and scheduler.get("prediction_type") == "flow_prediction":  # DPM++, SANA's default
        shift = scheduler["flow_shift"]
    if shift is None:
        raise ValueError(f"{teacher}: the scheduler has neither shift nor flow_shift with flow_prediction")
    if scheduler.get("use_dynamic_shifting"):
        raise ValueError(f"{teacher}: the scheduler has use_dynamic_shifting, only a static shift is supported")
    return shift


# ---- guidance


def conditioned(backbone: Backbone, model: nn.Module, cond: Conditioning) -> Denoise:
    """The network under fixed prompts, as a denoiser."""
    return lambda latents, level: backbone.denoise(model, latents, level, cond)


def guided(
    backbone: Backbone,
    model: nn.Module,
    cond: Conditioning,
    uncond: Conditioning,
    scale: float,
    *,
    interval: tuple[float, float] = EVERY_LEVEL,
    batch: GuidanceBatch = "joint",
) -> Denoise:
    """The network under fixed prompts with classifier-free guidance, as a denoiser.

    At scale 1 the unconditional half is not computed.

    Args:
        cond: batch of B.
        uncond: batch of 1, expanded to B.
        scale: of guidance; 1 is none in all families.
        interval: range of `noise_share`, ends included, in which a sample is guided; outside it gets the conditional
            prediction (arXiv:2404.07724). Both halves are computed at every level.
        batch: ``joint`` runs both halves in one batch of 2 B, ``apart`` in two of B, which takes less memory. The
            results differ by rounding only.
    """
    if scale == 1:
        return conditioned(backbone, model, cond)
    uncond = {name: uncond[name].expand_as(value) for name, value in cond.items()}
    both = {name: torch.cat([value, uncond[name]]) for name, value in cond.items()} if batch == "joint" else {}

    def denoise(latents: Tensor, level: NoiseLevel) -> Tensor:
        if batch == "joint":
            levels = level
            if level.sigma.ndim > 0:  # one level per sample
                levels = NoiseLevel(
                    *(torch.cat([value, value]) for value in (level.alpha, level.sigma, level.timestep))
                )
            cond_x0, uncond_x0 = backbone.denoise(model, torch.cat([latents, latents]), levels, both).chunk(2)
        else:
            cond_x0, uncond_x0 = (backbone.denoise(model, latents, level, half) for half in (cond, uncond))
        x0 = backbone.guide(cond_x0, uncond_x0, scale, latents, level)
        if interval == EVERY_LEVEL:
            return x0
        share = noise_share(level)
        return torch.where((interval[0] <= share) & (share <= interval[1]), x0, cond_x0)

    return denoise
