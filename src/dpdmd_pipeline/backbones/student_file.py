"""The contract between trainer and sampler: weights whose header says how they were trained to be sampled.

The header is the safetensors metadata of a diffusers weight file, strings only, keys `dpdmd.*`. Every
sampler of ours reads its schedule from there; a wrong schedule has no place to come from.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import nn

FORMAT = "1"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class StudentHeader:
    """How a student is sampled.

    Attributes:
        family: of `backbones/`.
        sigmas: N + 1 falling levels, the last 0.
        prediction: what the network returns: flow, eps or x0.
        sampler: euler, or renoise.
        guidance: 1.0; a student is sampled without classifier-free guidance.
    """

    family: str
    sigmas: list[float]
    prediction: str = "flow"
    sampler: str = "euler"
    guidance: float = 1.0

    def metadata(self) -> dict[str, str]:
        """As safetensors metadata."""
        return {
            "format": "pt",
            "dpdmd.format": FORMAT,
            "dpdmd.family": self.family,
            "dpdmd.prediction": self.prediction,
            "dpdmd.sampler": self.sampler,
            "dpdmd.sigmas": json.dumps(self.sigmas),
            "dpdmd.guidance": str(self.guidance),
        }


def save_student(folder: Path, model: nn.Module, header: StudentHeader) -> None:
    """Write a diffusers model folder: `from_pretrained` loads it, and the weight file carries the header.

    The same student gives the same bytes, on every machine.
    """
    from safetensors.torch import save_file

    model.save_config(folder)
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)  # where the teacher lies on this machine
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, Path(folder) / WEIGHTS, metadata=header.metadata())
    _sort_metadata(Path(folder) / WEIGHTS)


def _sort_metadata(path: Path) -> None:
    """Put the metadata of a safetensors file in order: the library writes it in another order in every process.

    Raises:
        ValueError: if the header does not fit into its place any more.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{path}: the sorted header has {len(text)} bytes, its place {length}")
        file.seek(8)
        file.write(text.ljust(length))  # spaces at the end are part of the format


def load_header(folder: Path) -> StudentHeader:
    """Read the header of a student's folder.

    Raises:
        FileNotFoundError: if the folder holds no weight file.
        ValueError: if the file was not written by `save_student`, or by a newer version of it.
    """
    from safetensors import safe_open

    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no student weights there; run `kedro run --pipelines train` first")
    with safe_open(path, framework="pt") as file:
        found = file.metadata() or {}
    if found.get("dpdmd.format") != FORMAT:
        raise ValueError(f"{path}: dpdmd.format is {found.get('dpdmd.format')!r}, this version reads {FORMAT!r}")
    return StudentHeader(
        family=found["dpdmd.family"],
        sigmas=json.loads(found["dpdmd.sigmas"]),
        prediction=found["dpdmd.prediction"],
        sampler=found["dpdmd.sampler"],
        guidance=float(found["dpdmd.guidance"]),
    )
