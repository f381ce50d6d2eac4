"""Check of a teacher's folder before a run, part by part as the libraries will read it: it is foreign input.

Opened are configs, tokenizers, headers of weights, their tensors of at most SMALL numbers and the first rows of others.
"""

from __future__ import annotations

import errno
import inspect
import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpdmd_pipeline.backbones import COMPONENTS, network_folder
from dpdmd_pipeline.backbones.base import load_quietly, pipeline_class, token_limits
from dpdmd_pipeline.backbones.networks import check_keys, network_config, shapes_of
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.backbones.tensor_files import check_finite, open_tensors
from dpdmd_pipeline.backbones.texts import count_tokens
from dpdmd_pipeline.datasets.pretrained import INDEX, components, weight_files
from dpdmd_pipeline.limits import first_names, read_json
from dpdmd_pipeline.wording import one_line, short

LARGEST = 10_000_000  # of the integers in a config; real ones have vocabularies of 256,000
MODULES = 20_000  # of a network; SDXL's has 2,000
POSITIONS = 512  # along a side of SD3's table of positions, which is computed; SD3.5's has 384
SMALL = 2**16  # numbers of a tensor that is read whole


def unreadable_teacher(pipeline: Any, catalog: Any, *, is_downloaded: bool = False) -> list[str]:
    """One line for each part of the run's teacher that cannot be read.

    Weights may still have to be downloaded; with `is_downloaded` they are there, and only a download is checked.
    """
    if "teacher" not in pipeline.inputs() or not {"teacher", "params:backbone"} <= set(catalog):
        return []
    teacher = catalog.get("teacher")
    from_hub = hasattr(teacher, "load_configs")
    is_local = not from_hub or teacher.is_local
    if is_downloaded and is_local:
        return []
    folder = teacher.load_configs() if from_hub and not is_downloaded else teacher.load()
    backbone = BackboneOptions.model_validate(catalog.get("params:backbone").load())
    return [*faulty_parts(folder, backbone, is_complete=is_local or is_downloaded)]


def faulty_parts(folder: Path, backbone: BackboneOptions, *, is_complete: bool = True) -> Iterator[str]:
    """One line for each part of a pipeline's folder that cannot be read; without `is_complete` weights may be missing.

    It takes 0.1 s for the embedded teacher once diffusers and transformers are imported.
    """
    try:
        classes = _classes(folder, backbone.family)
        _check_links(folder, classes)
    except (ValueError, OSError) as error:
        yield one_line(error)
        return
    faults = [line for part, kind in classes.items() if (line := _fault(folder / part, kind, is_complete))]
    yield from faults
    if not faults:
        with _faults_of(folder) as lines:
            model = backbone.load(folder, "cpu")
            model.schedule(backbone.num_steps)
            model.conditioning_shapes()
            for part, limit in token_limits(backbone.family, folder, backbone.max_sequence_length).items():
                if limit.count is not count_tokens:  # a chat template may be missing
                    limit.count(classes[part].from_pretrained(folder / part, local_files_only=True), [""])
            if reason := model.distilled():
                raise ValueError(f"{folder} holds a few-step student, no teacher: {reason}")
        yield from lines


def _fault(folder: Path, kind: type, is_complete: bool) -> str | None:
    """The line for a part that cannot be read."""
    with _faults_of(folder) as lines:
        for path in sorted(folder.glob("*.json")):
            read_json(path)
        if hasattr(kind, "state_dict"):
            _check_network(folder, kind, is_complete)
        elif folder.name == "scheduler":
            config = kind.load_config(folder)
            _check_integers(config)
            _refuse_noise(folder, config)
            kind.from_config(config)
        elif folder.name.startswith("tokenizer"):
            _check_tokenizer(folder, kind)
        else:
            kind.from_pretrained(folder, local_files_only=True)
    return lines[0] if lines else None


@contextmanager
def _faults_of(folder: Path) -> Iterator[list[str]]:
    """Collect the line of the first error of a block; it names the folder."""
    lines: list[str] = []
    try:
        with load_quietly():
            yield lines
    except FileNotFoundError as error:
        lines.append(f"{one_line(error)}: save the whole teacher with `save_pretrained(FOLDER)`, without a variant")
    except Exception as error:  # whatever the libraries raise for a damaged file
        line = short(one_line(error), 600)
        about = line.startswith("backbone.") or str(folder) in line  # an option, or a file
        expected = isinstance(error, ValueError | OSError) and about
        lines.append(line if expected else f"{folder} cannot be read ({type(error).__name__}: {line}): copy it again")


@cache
def pipeline_numbers(folder: Path, family: str) -> tuple[int, int]:
    """Numbers in the weights of a pipeline, and of its denoising network alone, by the configs."""
    numbers = {}
    for part, kind in _classes(folder, family).items():
        if hasattr(kind, "state_dict"):
            with load_quietly(), torch.device("meta"):
                if hasattr(kind, "load_config"):
                    network = kind.from_config(network_config(kind, folder / part))
                else:
                    network = kind(kind.config_class.from_pretrained(folder / part))
            numbers[part] = sum(weight.numel() for weight in network.parameters())
    return sum(numbers.values()), numbers[network_folder(folder).name]


# ---- the index and the links


def _classes(folder: Path, family: str) -> dict[str, type]:
    """Class of each part that the family's pipeline reads; ValueError if one is missing or of another class."""
    import diffusers
    import transformers
    from diffusers import SchedulerMixin
    from transformers import PreTrainedTokenizerBase

    index, pipeline, remedy = folder / INDEX, pipeline_class(family), "set backbone.family to the teacher's own"
    named, parts = read_json(index).get("_class_name"), components(folder)
    if named != pipeline.__name__:
        raise ValueError(f"{index}: the pipeline is {named!r:.80}, {family} has a {pipeline.__name__}: {remedy}")
    classes = {}
    for part, parameter in list(inspect.signature(pipeline.__init__).parameters.items())[1:]:
        if part not in parts:
            if parameter.default is parameter.empty and not part.endswith("_3"):  # SD3 works without T5
                raise ValueError(f"{index} names no {part}, which a {pipeline.__name__} needs: save the whole teacher")
            continue
        library, name = parts[part]
        kind = getattr({"diffusers": diffusers, "transformers": transformers}.get(library), name, None)
        expected = parameter.annotation
        if part.startswith(("scheduler", "tokenizer")):  # any of them
            expected = SchedulerMixin if part == "scheduler" else PreTrainedTokenizerBase
        if not (isinstance(kind, type) and issubclass(kind, expected)):
            raise ValueError(f"{index}: {part} is {library}.{name:.80}, expected a {expected.__name__}: {remedy}")
        classes[part] = kind
    return classes


def _check_links(folder: Path, classes: Mapping[str, type]) -> None:
    """Refuse links that lead out of the folder or nowhere; the hub's cache keeps files elsewhere in its own folder."""
    root = Path(os.path.realpath(folder))
    if root.parent.name == "snapshots" and (root.parents[1] / "blobs").is_dir():
        root = root.parents[1]
    parts = [folder / part for part in classes]
    for path in (folder / INDEX, *parts, *(path for part in parts for path in part.rglob("*"))):
        try:
            target = Path(os.path.realpath(path, strict=True))
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise ValueError(f"{path} is a link that leads to itself: replace it by the file") from error
            continue  # an interrupted download, or a missing part
        if not target.is_relative_to(root):
            raise ValueError(f"{path} leads out of the folder, to {target}: copy the file into the folder")
        if not target.is_file() and not target.is_dir():
            raise ValueError(f"{path} is a pipe, socket or device: replace it by a file")


# ---- parts


def _refuse_noise(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a scheduler that adds noise in each step: anchors are points on the teacher's ODE."""
    algorithm = str(config.get("algorithm_type"))
    if config.get("stochastic_sampling") or algorithm.startswith("sde"):
        value = "stochastic_sampling: true" if config.get("stochastic_sampling") else f"algorithm_type: {algorithm:.80}"
        raise ValueError(f"{folder} has {value}, an SDE: give the teacher's deterministic scheduler (an ODE)")


def _check_tokenizer(folder: Path, kind: Any) -> None:
    """Check that transformers can load a tokenizer, and that it fits its text encoder."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    models = sorted(path.name for path in folder.glob("*.model"))
    can_convert = is_sentencepiece_available() and is_protobuf_available()
    if models and not can_convert and not (folder / "tokenizer.json").is_file():
        raise ValueError(
            f"{folder} has {models[0]} alone: `pip install sentencepiece protobuf`, or save it as tokenizer.json"
        )
    tokens = len(kind.from_pretrained(folder, local_files_only=True))
    encoder = folder.with_name(folder.name.replace("tokenizer", "text_encoder")) / "config.json"
    size = read_json(encoder).get("vocab_size") if encoder.is_file() else None
    if size and not size / 2 <= tokens <= size:  # transformers makes an empty tokenizer from some damaged files
        raise ValueError(f"{folder} has {tokens} tokens, {encoder.parent.name} has {size}: copy both again")


def _check_network(folder: Path, kind: Any, is_complete: bool) -> None:
    """Hold a network's config against its class and its weights; no weight is loaded."""
    config, of_diffusers = read_json(folder / "config.json"), hasattr(kind, "load_config")
    _check_config(folder / "config.json", config, of_diffusers)
    try:
        files = weight_files(folder, "diffusers" if of_diffusers else "transformers")
    except FileNotFoundError:
        if is_complete:
            raise
        return
    for path in files:
        _check_numbers(path)
    with _few_modules(folder):
        if not of_diffusers:
            _check_text_encoder(folder, kind, config)
            return
        with torch.device("meta"):
            shapes = shapes_of(kind.from_config(network_config(kind, folder)))
    if folder.name in COMPONENTS:
        check_keys(files, shapes)
        return
    # diffusers renames weights of old autoencoders
    _, loaded = kind.from_pretrained(folder, use_safetensors=True, device_map="meta", output_loading_info=True)
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(f"{folder} lacks {len(missing)} weights ({first_names(missing)}): download or save it again")


def _check_config(path: Path, config: Mapping[str, Any], of_diffusers: bool) -> None:
    if quantization := config.get("quantization_config"):
        method = str(quantization["quant_method"])
        if of_diffusers or find_spec(method) is None:
            reason = "the network is trained" if of_diffusers else f"the library {method} is not installed"
            raise ValueError(f"{path}: the weights are quantised ({method}), and {reason}: give them in float16")
    _check_integers(config)
    if (side := config.get("pos_embed_max_size") or 0) > POSITIONS:
        raise ValueError(f"{path}: pos_embed_max_size = {side}, expected at most {POSITIONS}")
    for name, least in (("scaling_factor", 0), ("shift_factor", -math.inf)):
        value = config.get(name)
        if value is not None and not (isinstance(value, int | float) and least < value < math.inf):
            raise ValueError(f"{path}: {name} = {value!r:.80}, expected a finite number above {least}")


def _check_integers(value: Any, name: str = "") -> None:
    """Refuse a config whose integers would make the library compute without end."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_integers(inner, f"{name}.{key}".lstrip("."))
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name} = {value!r:.80}, expected at most {LARGEST}")


def _check_text_encoder(folder: Path, kind: Any, config: Mapping[str, Any]) -> None:
    """Check a text encoder's type and, by transformers' own loading without numbers, its weights."""
    expected, named = kind.config_class.model_type, config.get("model_type")
    if named not in (expected, None):
        raise ValueError(f"{folder} has model_type {named!r:.80}, a {kind.__name__} has {expected!r}: copy it again")
    network, loaded = kind.from_pretrained(
        folder,
        local_files_only=True,
        use_safetensors=True,
        device_map="meta",
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    layered = {_without_number(name) for name in network.state_dict()}
    faults = {
        "missing": sorted(loaded["missing_keys"]),
        "resized": sorted(name for name, *_ in loaded["mismatched_keys"]),
        "of further layers": sorted(name for name in loaded["unexpected_keys"] if _without_number(name) in layered),
    }
    counts = [f"{len(names)} {fault} ({first_names(names)})" for fault, names in faults.items() if names]
    if counts:
        raise ValueError(f"the weights in {folder} do not fit its config: {' and '.join(counts)}")


def _without_number(name: str) -> str:
    return re.sub(r"\.\d+\.", ".0.", name)


def _check_numbers(path: Path) -> None:
    """Check that small tensors, and the first rows of others, are finite; norms and biases show a failed training."""
    with open_tensors(path) as file:
        for name in file.keys():  # noqa: SIM118
            values = file.get_slice(name)
            if shape := values.get_shape():
                check_finite(path, {name: values[:] if math.prod(shape) <= SMALL else values[:1]})


@contextmanager
def _few_modules(folder: Path) -> Iterator[None]:
    """Refuse a config that makes a network of more than MODULES modules, such as one of a million layers."""
    count = 0

    def register(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MODULES:
            raise ValueError(f"{folder}: its config makes more than {MODULES} modules: copy it again")

    handle = nn.modules.module.register_module_module_registration_hook(register)
    try:
        yield
    finally:
        handle.remove()
