"""The parameter group `backbone`: the teacher's family and how it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.sizes import check_resolution
from dpdmd_pipeline.bounds import CountOrZero, Few, StrictModel

if TYPE_CHECKING:
    from dpdmd_pipeline.backbones.base import Backbone

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
BaseWeights = Literal["as_teacher", "fp8", "int8", "nf4"]  # storage of a frozen network's linear layers


class TeacherStart(StrictModel):
    """Sampling by two models: the teacher takes the first steps of a picture, a few-step student the others.

    DP-DMD's anchor, used at inference; related: arXiv:2503.10637.
    """

    steps: Few  # of the teacher, at equal distances of the network's timestep
    landing: Few = 1  # first steps of the student that they replace; at least one must remain
    guidance_scale: float | None = Field(None, ge=1)  # of the teacher; null: its own, 1: none

    def evaluations(self, scale: float) -> int:
        """Evaluations of the teacher's network for one picture; `scale` is its own guidance."""
        scale = scale if self.guidance_scale is None else self.guidance_scale
        return self.steps * (1 if scale == 1 else 2)

    def check_landing(self, num_steps: int) -> None:
        """Raise a ValueError if the start leaves a student of `num_steps` no step."""
        if self.landing >= num_steps:
            remedy = f"give 1 to {num_steps - 1}" if num_steps > 1 else "a student of one step leaves the teacher none"
            raise ValueError(f"teacher_start.landing is {self.landing}, the student has {num_steps} steps: {remedy}")


class PromptNoise(StrictModel):
    """Uniform noise in some values of the prompt's embeddings during a student's first step, as people add for variety.

    The baseline that a teacher start is compared with; ComfyUI users know it as seed variance.
    """

    strength: float = Field(gt=0)  # the noise lies between -strength and strength
    share: float = Field(0.5, gt=0, le=1)  # of the values


class BackboneOptions(StrictModel):
    """Options of the teacher that every stage shares."""

    family: Literal[FAMILIES]  # name of a file in `backbones/`
    # of the pictures, in pixels: a square one's side, or a list of [height, width] that take turns in training
    resolution: Annotated[Any, AfterValidator(check_resolution)]
    max_sequence_length: CountOrZero  # tokens of SD3's T5 or of a language model; 0 for a teacher without them
    num_steps: Few  # of the teacher's sampling
    guidance_scale: float = Field(ge=1)  # s in u + s (c - u); 1 is none. Z-Image's pipeline counts s - 1
    # noise levels of DMD and the fake score, as fractions of the schedule before its shift; YAML has lists, no tuples
    level_range: Annotated[tuple[float, float], Field(strict=False)]
    dtype: Dtype  # of the networks; everything outside them is float32
    # of the teacher where it is a network of its own: for anchors, its pictures, and training with roles=full. Adapters
    # share their base, in `dtype`. null: dtype
    teacher_dtype: Dtype | None

    @field_validator("level_range")
    @classmethod
    def _check_level_range(cls, level_range: tuple[float, float]) -> tuple[float, float]:
        if not 0 < level_range[0] < level_range[1] <= 1:
            raise ValueError("give 0 < low < high <= 1")
        return level_range

    @property
    def evaluations(self) -> int:
        """Evaluations of the teacher's network for one of its pictures; guidance takes two for each step."""
        return self.num_steps * (1 if self.guidance_scale == 1 else 2)

    def load_teacher(self, folder: Path, device: Device) -> "Backbone":
        """Load the adapter in the frozen teacher's own dtype."""
        return self.model_copy(update={"dtype": self.teacher_dtype or self.dtype}).load(folder, device)

    def load(self, folder: Path, device: Device) -> "Backbone":
        """Load the adapter for a teacher's folder, as in `load_backbone`."""
        import torch

        from dpdmd_pipeline.backbones.base import load_backbone

        return load_backbone(
            self.family,
            folder,
            resolution=self.resolution,
            max_sequence_length=self.max_sequence_length,
            level_range=self.level_range,
            dtype=getattr(torch, self.dtype),
            device=resolve_device(device),
        )


def resolve_device(device: Device) -> Any:
    """Resolve to a torch.device that exists; `auto` is CUDA if torch finds it, else the CPU."""
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        version = getattr(torch._C, "_cuda_getDriverVersion", int)()  # 0 without a driver, or in a torch for CPUs
        _check_driver(version, torch.version.cuda)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device is 'cuda', but torch finds no CUDA device here: set it to 'auto' or 'cpu', "
            "or install a torch that fits your driver"
        )
    return torch.device(device)


def _check_driver(version: int, needed: str | None) -> None:
    """Raise a ValueError if there is a GPU's driver (CUDA 12.4 is 12040) that is older than torch's CUDA."""
    if needed and 0 < version // 1000 < int(needed.split(".")[0]):
        raise ValueError(
            f"the NVIDIA driver is for CUDA {version // 1000}.{version % 1000 // 10}, torch needs one for {needed}: "
            "update the driver, install a torch for that CUDA, or set device=cpu"
        )
