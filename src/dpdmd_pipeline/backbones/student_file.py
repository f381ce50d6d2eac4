"""Files of a student: write and read its weights, full or LoRA, with the header that describes their sampling."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones import COMPONENTS
from dpdmd_pipeline.backbones.lora import add_lora, check_lora, peft_from_file
from dpdmd_pipeline.backbones.networks import (
    WEIGHTS,
    check_keys,
    check_shapes,
    from_original,
    original_names,
    shapes_of,
)
from dpdmd_pipeline.backbones.student_header import StudentHeader, header_error
from dpdmd_pipeline.backbones.tensor_files import (
    check_content,
    check_finite,
    load_metadata,
    load_tensors,
    open_tensors,
    refuse_pickles,
    save_weights,
)
from dpdmd_pipeline.errors import MissingInputError
from dpdmd_pipeline.limits import read_json, write_json

ADAPTER = "adapter.safetensors"
HISTORY = "history.json"  # a record per cycle of the training


# ---- writing


def save_student(folder: Path, model: nn.Module, header: StudentHeader) -> None:
    """Write a diffusers model folder: `from_pretrained` loads it, and the weight file carries the header."""
    model.save_config(folder)
    config_file = Path(folder) / "config.json"
    write_json(config_file, read_json(config_file))
    save_weights(Path(folder) / WEIGHTS, model.state_dict(), header.metadata())


def save_lora(folder: Path, state: Mapping[str, Tensor], header: StudentHeader) -> None:
    """Write a LoRA student into an existing folder.

    Args:
        state: as returned by peft's `get_peft_model_state_dict`: ``<module>.lora_A.weight`` [rank, in] and
            ``<module>.lora_B.weight`` [out, rank] per adapted module of the network.
        header: of kind lora and the state's rank.
    """
    if header.kind != "lora":
        raise header_error("kind", header.kind, "adapter weights are of kind lora")
    check_lora(state, header.lora_rank)
    # A model folder has a config.json; this one repeats facts of the header.
    config = {"family": header.family, "kind": "lora", "lora_alpha": header.lora_alpha, "lora_rank": header.lora_rank}
    write_json(Path(folder) / "config.json", config)
    save_weights(Path(folder) / ADAPTER, state, header.metadata())


def save_history(folder: Path, history: list[dict]) -> None:
    """Write the records of a student's training beside its weights."""
    (Path(folder) / HISTORY).write_text(json.dumps(history) + "\n")


# ---- reading


def weight_file(path: Path) -> Path:
    """Find the one file with a student's weights: `path` itself, or in a student's folder or an exported pipeline.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a pickle, or a network in several files.
    """
    path = Path(path)
    refuse_pickles([path])
    if path.is_file():
        return path
    for name in (WEIGHTS, ADAPTER, *(f"{component}/{WEIGHTS}" for component in COMPONENTS)):
        if (path / name).is_file():
            return path / name
    refuse_pickles(sorted(path.glob("*")))
    if indexes := sorted(path.glob("*.safetensors.index.json")):
        raise ValueError(f"{indexes[0]}: the network is in several files: save the student in one file")
    raise MissingInputError(f"{path / WEIGHTS}: no student weights", stage="train")


def load_header(path: Path) -> StudentHeader:
    """Read the header of a student; the path is as in `weight_file`.

    Raises:
        FileNotFoundError: if there is no weight file.
        ValueError: if the file was not written by this package, or by a newer version of it.
    """
    file = weight_file(path)
    metadata = load_metadata(file)
    try:
        return StudentHeader.from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_finished(folder: Path, identity: str) -> list[dict] | None:
    """History of a student's folder if its student has this identity; None if it is another one or cannot be read."""
    try:
        header = load_header(folder)
        history = json.loads((Path(folder) / HISTORY).read_text())
    except (OSError, ValueError):
        return None
    return history if header.identity == identity else None


def load_lora(path: Path, modules: Iterable[str] = ()) -> tuple[dict[str, Tensor], StudentHeader]:
    """Read a LoRA, from a student's folder or an exported file, with peft's keys.

    Args:
        path: as in `weight_file`.
        modules: names of the network's modules; needed for the exported files of a UNet.
    """
    file = weight_file(path)
    header = load_header(file)
    if header.kind != "lora":
        raise ValueError(f"{file}: dpdmd.kind is {header.kind!r}, expected a LoRA: load it as full weights")
    state = peft_from_file(load_tensors(file), modules)
    check_finite(file, state)
    check_lora(state, header.lora_rank)
    return state, header


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, family: str) -> None:
    """Load a student into the network of its teacher, in place and in the network's precision.

    A full student replaces every weight, a LoRA is added to them.

    Args:
        path: as in `weight_file`; without a header of this project, only keys and shapes are checked.
        model: of the teacher's architecture, with weights.
        family: of the model.

    Raises:
        ValueError: if the weights are of another family, have other keys or shapes than the network (the first three
            are named), are not finite, or are a pickle.
        OSError: if the weight file is missing, incomplete or damaged.
    """
    file = weight_file(path)
    if "dpdmd.format" in load_metadata(file):
        header = load_header(file)
        check_family(file, header, family)
        if header.kind == "lora":
            state, _ = load_lora(file, [name for name, _ in model.named_modules()])
            return add_lora(model.state_dict(), state, header.lora_scale)
    with open_tensors(file) as stored:
        names = original_names(stored.keys())
    if not names:
        check_keys([file], shapes_of(model))
    check_content(file)
    with open_tensors(file) as stored:
        if names:
            weights = from_original(file, {name: stored.get_tensor(name) for name in names}, model)
            check_finite(file, weights)
            check_shapes(file, {name: tuple(value.shape) for name, value in weights.items()}, shapes_of(model))
            model.load_state_dict(weights)
            return
        for name, value in model.state_dict().items():
            tensor = stored.get_tensor(name)
            check_finite(file, {name: tensor})
            value.copy_(tensor)


def check_family(path: Path, header: StudentHeader, family: str) -> None:
    """Refuse a student whose family is not the teacher's."""
    if header.family != family:
        raise ValueError(
            f"{path}: the student is of family {header.family!r}, the teacher of {family!r}: "
            "give the teacher that it was distilled from"
        )


def check_prediction(path: Path, header: StudentHeader, prediction: str, teacher: Path) -> None:
    """Refuse a student whose prediction type is not that of the teacher's pipeline."""
    if header.prediction != prediction:
        raise ValueError(
            f"{path}: the student predicts {header.prediction!r}, the pipeline in {teacher} {prediction!r}: "
            "give the teacher that it was distilled from"
        )
