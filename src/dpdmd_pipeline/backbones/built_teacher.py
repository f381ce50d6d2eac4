"""A diffusers pipeline's folder made from a single file, from a LoRA that is fused into a teacher, or from both."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dpdmd_pipeline.limits import first_names, read_json
from dpdmd_pipeline.wording import one_line

# Starts of keys in single files of a whole SDXL or SD3; those of other families hold the network alone
_WHOLE_KEYS = ("first_stage_model.", "conditioner.", "text_encoders.")
# Starts of a text encoder's keys there
_TEXT_KEYS = {
    "text_encoder": ("conditioner.embedders.0.", "text_encoders.clip_l."),
    "text_encoder_2": ("conditioner.embedders.1.", "text_encoders.clip_g."),
    "text_encoder_3": ("text_encoders.t5xxl.",),
}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' name -> torch's


class Lora(NamedTuple):
    """A LoRA file and the factor of its change."""

    path: Path
    scale: float

    @classmethod
    def parse(cls, text: str) -> Lora:
        """Read `file.safetensors@0.8`; without a number the factor is 1."""
        path, at, scale = text.rpartition("@")
        try:
            lora = cls(Path(path if at else text).expanduser(), float(scale) if at else 1.0)
        except ValueError as error:
            raise ValueError(f"teacher_lora={text}: {scale!r} is no number: give file.safetensors@0.8") from error
        if not lora.path.is_file():
            raise FileNotFoundError(
                f"teacher_lora={text}: {lora.path} is no file: give a .safetensors file on this disk"
            )
        return lora


def stamp(path: Path) -> list[Any]:
    """Name, size and time of a file, or of all files of a folder; it changes when they change."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def build(folder: Path, source: Path, config: Path, lora: Lora | None) -> None:
    """Write a pipeline's folder, in the precision of the source's weights.

    Args:
        folder: does not exist yet.
        source: single file of a model's authors, or a pipeline's folder.
        config: folder with the configs and tokenizers of the pipeline, and with the parts that a single file lacks.
        lora: in any layout that diffusers reads; of the network, and of text encoders if it has them.

    Raises:
        ValueError: if a part or some weights are missing, a shape differs, or the LoRA does not fit.
        OSError: if a file is missing or incomplete.
    """
    import diffusers

    from dpdmd_pipeline.backbones import network_folder
    from dpdmd_pipeline.backbones.base import load_quietly
    from dpdmd_pipeline.backbones.networks import network_files

    index = read_json(config / "model_index.json")
    kind = getattr(diffusers, str(index.get("_class_name")), None)
    if not hasattr(kind, "lora_state_dict"):
        raise ValueError(
            f"{config}: diffusers has no pipeline {index.get('_class_name')!r:.80}: give another teacher_config"
        )
    absent = {name: None for name, value in index.items() if value == [None, None]}
    dtype = _dtype(source if source.is_file() else network_files(network_folder(source))[0])
    with load_quietly(), warnings.catch_warnings(action="ignore"):
        with _one_line_for(source):
            load, origin, parts = kind.from_pretrained, source, absent
            if source.is_file() and (network := _network_alone(source, config, index, dtype)):
                origin, parts = config, absent | network
            elif source.is_file():
                load, parts = kind.from_single_file, absent | _text_encoders(source, config, index, dtype)
                parts["config"] = str(config)
            pipeline = load(str(origin), torch_dtype=dtype, local_files_only=True, **parts)
        _check_loaded(source, pipeline)
        if lora:
            _fuse(pipeline, lora)
        pipeline.save_pretrained(folder)


def _network_alone(file: Path, config: Path, index: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """The network of a single file without other parts, by its name in the pipeline; empty if the file has others."""
    from dpdmd_pipeline.backbones import network_folder
    from dpdmd_pipeline.backbones.base import class_of
    from dpdmd_pipeline.backbones.tensor_files import stored_shapes

    if any(name.startswith(_WHOLE_KEYS) for name in stored_shapes([file])):
        return {}
    folder = network_folder(config)
    load = class_of(*index[folder.name]).from_single_file
    return {folder.name: load(str(file), config=str(folder), torch_dtype=dtype, local_files_only=True)}


def _text_encoders(file: Path, config: Path, index: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Text encoders that a single file lacks, from the folder of its configs: diffusers looks there for others only."""
    from dpdmd_pipeline.backbones.base import class_of, load_part
    from dpdmd_pipeline.backbones.tensor_files import stored_shapes

    names, parts = stored_shapes([file]), {}
    for part, kind in index.items():
        is_encoder = part.startswith("text_encoder") and kind != [None, None]
        if not is_encoder or any(name.startswith(_TEXT_KEYS.get(part, ())) for name in names):
            continue
        if not any((config / part).glob("*.safetensors")):
            remedy = f"give teacher_config=FOLDER, a whole diffusers folder with {part}/"
            raise ValueError(f"{file} has no {part}, nor has {config}: {remedy}")
        parts[part] = load_part(class_of(*kind), config / part, dtype)
    return parts


def _dtype(file: Path) -> Any:
    """The precision of most tensors of a file; ValueError for one in 8 bits, whose scales diffusers would drop."""
    import torch

    from dpdmd_pipeline.backbones.tensor_files import open_tensors

    with open_tensors(file) as tensors:
        dtypes = Counter(tensors.get_slice(name).get_dtype() for name in tensors.keys())  # noqa: SIM118
    if eighths := sorted(name for name in dtypes if name.startswith("F8")):
        raise ValueError(f"{file} has weights in {eighths[0]}: give the file in 16 bits")
    known = [name for name, _ in dtypes.most_common() if name in _DTYPES]
    return getattr(torch, _DTYPES[known[0]] if known else "float32")


@contextmanager
def _one_line_for(file: Path) -> Iterator[None]:
    """Turn whatever diffusers and peft raise for weights that they do not know into one line with the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(str(file)):
            raise
        line = one_line(error).partition(" Please load the component")[0]
        hint = "give a file of the environment's family, or with teacher_config a folder that has the missing part"
        raise ValueError(f"{file}: {line[:300]} ({type(error).__name__}): {hint}") from error


def _check_loaded(source: Path, pipeline: Any) -> None:
    """Refuse a pipeline with weights that the source lacks: diffusers leaves them empty."""
    for part, network in pipeline.components.items():
        weights = network.state_dict() if hasattr(network, "state_dict") else {}
        if missing := [name for name, value in weights.items() if value.is_meta]:
            lack = f"{source} lacks {len(missing)} weights of the {part} ({first_names(missing)})"
            raise ValueError(f"{lack}: download or save it again")


def _fuse(pipeline: Any, lora: Lora) -> None:
    """Add a LoRA to the weights of a pipeline; ValueError unless all of it fits."""
    import torch

    from dpdmd_pipeline.backbones.start import read_lora

    network = getattr(pipeline, "transformer", None) or pipeline.unet
    with torch.device("meta"):
        _, others = read_lora(lora.path, type(network).from_config(network.config), type(pipeline))
    with _one_line_for(lora.path):
        pipeline.load_lora_weights(str(lora.path))
        encoders = [part for name, part in pipeline.components.items() if name.startswith("text_encoder") and part]
        found = sum(hasattr(module, "lora_A") for encoder in encoders for module in encoder.modules())
        if 2 * found != len(others):
            raise ValueError(f"{lora.path}: {2 * found} of its {len(others)} tensors for the text encoders fit")
        pipeline.fuse_lora(lora_scale=lora.scale, safe_fusing=True)
        pipeline.unload_lora_weights()
