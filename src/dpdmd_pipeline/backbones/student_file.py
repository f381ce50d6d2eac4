"""The contract between trainer, exporter and samplers: weights whose header says how they are to be sampled.

The header is the safetensors metadata of a weight file, strings only, keys `dpdmd.*`. Every sampler of ours
reads its schedule from there; a wrong schedule has no place to come from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.backbones.lora import add_lora, check_lora, listed, peft_from_file
from dpdmd_pipeline.dpdmd.noise import NUM_TRAIN_TIMESTEPS

FORMAT = "1"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ADAPTER = "adapter.safetensors"
COMPONENTS = ("transformer", "unet")  # what the network is called inside a pipeline's folder

KINDS = ("full", "lora")
PREDICTIONS = ("flow", "eps", "v")
SAMPLERS = ("euler", "renoise")
_PICKLES = {".bin", ".ckpt", ".pkl", ".pt", ".pth"}


@dataclass(frozen=True)
class StudentHeader:
    """How a student is sampled; refuses what no sampler of ours could follow.

    Attributes:
        family: name of a file in `backbones/`.
        sigmas: flow only: N + 1 falling levels, the first at most 1, the last 0.
        prediction: what the network returns: ``flow``, ``eps`` or ``v``.
        sampler: ``euler`` (deterministic: Euler for flow, DDIM with eta 0 for VP) or ``renoise``.
        guidance: 1.0; a student is sampled without classifier-free guidance.
        kind: ``full`` weights, or a ``lora`` to be added to the teacher's.
        timesteps: VP only (eps, v): N falling integers below 1000.
        shift: flow only: the family's static shift, for information; None if unknown.
        lora_rank, lora_alpha: lora only; the adapter is scaled by alpha / rank.
        resolution: of the pictures it was trained on, in pixels; None if unknown.
        max_sequence_length: tokens of the T5 encoder it was trained with; None if unknown.

    Raises:
        ValueError: naming the key, its value and what is allowed.
    """

    family: str
    sigmas: list[float] | None = None
    prediction: str = "flow"
    sampler: str = "euler"
    guidance: float = 1.0
    kind: str = "full"
    timesteps: list[int] | None = None
    shift: float | None = None
    lora_rank: int | None = None
    lora_alpha: float | None = None
    resolution: int | None = None
    max_sequence_length: int | None = None

    def __post_init__(self) -> None:
        known = {"family": FAMILIES, "kind": KINDS, "prediction": PREDICTIONS, "sampler": SAMPLERS}
        for key, choice in known.items():
            if getattr(self, key) not in choice:
                raise _wrong(key, getattr(self, key), f"choose one of {', '.join(choice)}")
        if self.guidance != 1:
            raise _wrong("guidance", self.guidance, "a student is sampled without guidance, at 1.0")
        self._check_levels()
        self._check_lora()
        for key, least in (("resolution", 1), ("max_sequence_length", 0)):
            value = getattr(self, key)
            if value is not None and not (_is_integer(value) and value >= least):
                raise _wrong(key, value, f"give an integer of at least {least}")

    def _check_levels(self) -> None:
        if self.prediction == "flow":
            _refuse_given(self, "timesteps", "belong to eps and v, prediction flow has sigmas")
            _check_sigmas(self.sigmas)
            if self.shift is not None and not _is_positive(self.shift):
                raise _wrong("shift", self.shift, "give a positive number")
        else:
            for key in ("sigmas", "shift"):
                _refuse_given(self, key, f"belongs to flow, prediction {self.prediction} has timesteps")
            _check_timesteps(self.timesteps)

    def _check_lora(self) -> None:
        if self.kind == "full":
            for key in ("lora_rank", "lora_alpha"):
                _refuse_given(self, key, "belongs to kind lora, this is full")
        elif not (_is_integer(self.lora_rank) and self.lora_rank > 0):
            raise _wrong("lora_rank", self.lora_rank, "give a positive integer")
        elif not _is_positive(self.lora_alpha):
            raise _wrong("lora_alpha", self.lora_alpha, "give a positive number")

    @property
    def num_steps(self) -> int:
        """Network evaluations of one picture."""
        return len(self.sigmas) - 1 if self.prediction == "flow" else len(self.timesteps)

    @property
    def grid(self) -> list[float] | list[int]:
        """Its levels as `Backbone.student_schedule` takes them: N sigmas, or N timesteps."""
        return self.sigmas[:-1] if self.prediction == "flow" else self.timesteps

    def metadata(self) -> dict[str, str]:
        """As safetensors metadata."""
        return {"format": "pt", "dpdmd.format": FORMAT} | {
            f"dpdmd.{key}": value if isinstance(value, str) else json.dumps(value)
            for key, value in vars(self).items()
            if value is not None
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> StudentHeader:
        """Read back what `metadata` gives; keys of others are left alone.

        Raises:
            ValueError: if the format is unknown, or a key is missing, unreadable or out of range.
        """
        if metadata.get("dpdmd.format") != FORMAT:
            raise ValueError(f"dpdmd.format is {metadata.get('dpdmd.format')!r}, this version reads {FORMAT!r}")
        required = {"family", "prediction", "sampler", "guidance"}
        if missing := sorted(key for key in required if f"dpdmd.{key}" not in metadata):
            raise ValueError(f"dpdmd.{missing[0]} is missing in the header: export the student again")
        found = {key: metadata.get(f"dpdmd.{key}") for key in cls.__dataclass_fields__}
        return cls(**{key: _read(key, text) for key, text in found.items() if text is not None})


def _wrong(key: str, value: Any, remedy: str) -> ValueError:
    return ValueError(f"dpdmd.{key} is {value!r}: {remedy}")


def _read(key: str, text: str) -> Any:
    """A value of the header from its text."""
    if key in ("family", "prediction", "sampler", "kind"):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(key, text, "it cannot be read; export the student again") from error


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _falls(values: list) -> bool:
    return all(before > after for before, after in zip(values, values[1:], strict=False))


def _refuse_given(header: StudentHeader, key: str, reason: str) -> None:
    if getattr(header, key) is not None:
        raise _wrong(key, getattr(header, key), reason)


def _check_sigmas(sigmas: Any) -> None:
    numbers = isinstance(sigmas, list) and len(sigmas) > 1 and all(_is_number(value) for value in sigmas)
    if not numbers or sigmas[0] > 1 or sigmas[-1] != 0 or not _falls(sigmas):
        raise _wrong("sigmas", sigmas, "give at least two numbers that fall strictly from at most 1 to 0")


def _check_timesteps(timesteps: Any) -> None:
    integers = isinstance(timesteps, list) and bool(timesteps) and all(_is_integer(value) for value in timesteps)
    if not integers or timesteps[0] >= NUM_TRAIN_TIMESTEPS or timesteps[-1] < 0 or not _falls(timesteps):
        raise _wrong("timesteps", timesteps, f"give integers that fall strictly from below {NUM_TRAIN_TIMESTEPS} to 0")


# ---- writing


def save_student(folder: Path, model: nn.Module, header: StudentHeader) -> None:
    """Write a diffusers model folder: `from_pretrained` loads it, and the weight file carries the header.

    The same student gives the same bytes, on every machine.
    """
    model.save_config(folder)
    config_file = Path(folder) / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("_name_or_path", None)  # where the teacher lies on this machine
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_weights(Path(folder) / WEIGHTS, model.state_dict(), header.metadata())


def save_lora(folder: Path, state: Mapping[str, Tensor], header: StudentHeader) -> None:
    """Write the folder of a student that is a LoRA.

    Args:
        folder: exists.
        state: as peft's `get_peft_model_state_dict` gives it: ``<module>.lora_A.weight`` [rank, in] and
            ``<module>.lora_B.weight`` [out, rank] per adapted module of the network.
        header: of kind lora.

    Raises:
        ValueError: if the header is of full weights, or the state is no LoRA of its rank.
    """
    if header.kind != "lora":
        raise _wrong("kind", header.kind, "adapter weights are of kind lora")
    check_lora(state, header.lora_rank)
    # A model folder has a config.json; what is told there is told by the header too.
    config = {"family": header.family, "kind": "lora", "lora_alpha": header.lora_alpha, "lora_rank": header.lora_rank}
    (Path(folder) / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_weights(Path(folder) / ADAPTER, state, header.metadata())


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file: the same content gives the same bytes, on every machine.

    Raises:
        ValueError: naming the first tensors that are not finite.
    """
    from safetensors.torch import save_file

    _refuse_not_finite(path, weights)
    tensors = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata=dict(metadata))
    _sort_metadata(path)


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


# ---- reading


def load_header(place: Path) -> StudentHeader:
    """Read the header of a student.

    Args:
        place: a student's folder, a diffusers pipeline that was exported, or a weight file.

    Raises:
        FileNotFoundError: if there is no weight file.
        ValueError: if the file was not written by this package, or by a newer version of it.
    """
    path = weight_file(place)
    return _header_of(path, load_metadata(path))


def load_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} if it has none."""
    with _opened(path) as file:
        return file.metadata() or {}


def weight_file(place: Path) -> Path:
    """The one file that holds a student's weights.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is a pickle, or a network in several files.
    """
    place = Path(place)
    if place.suffix in _PICKLES:
        raise _pickle(place)
    if place.is_file():
        return place
    for candidate in (WEIGHTS, ADAPTER, *(f"{component}/{WEIGHTS}" for component in COMPONENTS)):
        if (place / candidate).is_file():
            return place / candidate
    if found := sorted(path for path in place.glob("*") if path.suffix in _PICKLES):
        raise _pickle(found[0])
    if found := sorted(place.glob("*.safetensors.index.json")):
        raise ValueError(f"{found[0]}: the network lies in several files, a student of ours in one: save it in one")
    raise FileNotFoundError(f"{place / WEIGHTS}: no student weights there; run `kedro run --pipelines train` first")


def load_lora(place: Path, modules: Iterable[str] = ()) -> tuple[dict[str, Tensor], StudentHeader]:
    """Read what `save_lora` wrote, or a LoRA file that was exported: peft's keys, and the header.

    Args:
        place: the folder or file.
        modules: names of the network's modules, which the exported files of a UNet need.

    Raises:
        ValueError: if it is no LoRA, or not of the rank that its header tells.
        OSError: if there is no whole weight file.
    """
    path = weight_file(place)
    header = load_header(path)
    if header.kind != "lora":
        raise ValueError(f"{path}: dpdmd.kind is {header.kind!r}, a LoRA was asked for: load it as full weights")
    state = peft_from_file(load_tensors(path), modules)
    _refuse_not_finite(path, state)
    check_lora(state, header.lora_rank)
    return state, header


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@torch.no_grad()
def load_weights(place: Path, model: nn.Module, family: str) -> None:
    """Put a student into the network of its teacher, in place and in the network's precision.

    A full student replaces every weight, a LoRA is added to them.

    Args:
        place: a folder or a file; files without a header of ours are held to the network's keys alone.
        model: of the teacher's architecture, with weights.
        family: of the model.

    Raises:
        ValueError: if the weights are of another family, have a key or a shape that the network has not, lack
            one that it has (the first three are named), are not finite, or are a pickle.
        OSError: if there is no whole weight file.
    """
    path = weight_file(place)
    metadata = load_metadata(path)
    if "dpdmd.format" in metadata:
        header = _header_of(path, metadata)
        check_family(path, header, family)
        if header.kind == "lora":
            state, header = load_lora(path, [name for name, _ in model.named_modules()])
            return add_lora(model.state_dict(), state, header.lora_alpha / header.lora_rank)
    own = model.state_dict()
    check_keys([path], {name: tuple(value.shape) for name, value in own.items()})
    with _opened(path) as file:
        for name, value in own.items():
            tensor = file.get_tensor(name)
            _refuse_not_finite(path, {name: tensor})
            value.copy_(tensor)


def check_family(path: Path, header: StudentHeader, family: str) -> None:
    """Refuse a student of another family than the one at hand."""
    if header.family != family:
        raise ValueError(
            f"{path}: the student is of family {header.family!r}, the teacher of {family!r}: "
            "give the teacher that it was distilled from"
        )


def check_prediction(place: Path, header: StudentHeader, prediction: str, teacher: Path) -> None:
    """Refuse a student whose network returns something else than the networks of the pipeline at hand."""
    if header.prediction != prediction:
        raise ValueError(
            f"{place}: the student predicts {header.prediction!r}, the pipeline in {teacher} {prediction!r}: "
            "give the teacher that it was distilled from"
        )


def network_config(kind: Any, folder: Path) -> dict[str, Any]:
    """The config of a network's folder.

    Args:
        kind: the family's diffusers class.
        folder: of the network, as in a pipeline's ``transformer``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is of a network of another class.
    """
    remedy = "give a teacher of backbone.family, or set that to the teacher's own"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder / 'config.json'} does not exist: {remedy}")
    config = kind.load_config(folder)
    if config.get("_class_name") != kind.__name__:
        raise ValueError(f"{folder} holds a {config.get('_class_name')}, the family has a {kind.__name__}: {remedy}")
    return config


def load_network(kind: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A network from its folder, with all of its weights and no others, on the CPU.

    diffusers itself takes up any class's config, reads pickles, and only warns of missing and unknown keys. All of that
    is refused before weights are read.

    Raises:
        ValueError, OSError: as `network_config` and `check_network` do.
    """
    config = network_config(kind, folder)
    with torch.device("meta"):
        check_network(folder, kind.from_config(config))
    return kind.from_pretrained(folder, dtype=dtype, use_safetensors=True)


def check_network(folder: Path, model: nn.Module) -> None:
    """Hold a teacher's network folder against its architecture: diffusers itself only warns, and goes on.

    Args:
        folder: of one network, its weights in one safetensors file or in several with an index.
        model: made from the folder's config; its weights are not looked at.

    Raises:
        ValueError: as `check_keys` does.
        OSError: if there are no whole safetensors files.
    """
    check_keys(network_files(folder), {name: tuple(value.shape) for name, value in model.state_dict().items()})


def network_files(folder: Path) -> list[Path]:
    """The safetensors files of a network's folder: the one, or those of the index.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: if there is a pickle instead, or both the one and an index.
    """
    index, single = folder / f"{WEIGHTS}.index.json", (folder / WEIGHTS).is_file()
    if single and index.is_file():
        raise ValueError(f"{folder} has both {WEIGHTS} and an index of several files: delete what is not meant")
    if single:
        return [folder / WEIGHTS]
    if not index.is_file():
        others = sorted(path for path in folder.glob("*") if path.suffix in {*_PICKLES, ".safetensors"})
        if any(path.suffix in _PICKLES for path in others):
            raise _pickle(next(path for path in others if path.suffix in _PICKLES))
        there = f", only {listed([path.name for path in others])}" if others else ""
        raise FileNotFoundError(
            f"{folder / WEIGHTS}: no safetensors weights there{there}; save the network as safetensors"
        )
    return [folder / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))]


def stored_shapes(paths: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in safetensors files; their contents are not read."""
    found = {}
    for path in paths:
        with _opened(path) as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def check_keys(paths: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Hold weight files against a network: the same names with the same shapes, none more, none less.

    Raises:
        ValueError: naming the first three that differ.
    """
    found = stored_shapes(paths)
    more, less = sorted(found.keys() - shapes.keys()), sorted(shapes.keys() - found.keys())
    other = sorted(name for name in found.keys() & shapes.keys() if found[name] != tuple(shapes[name]))
    if more or less:
        faults = [f"{len(names)} {what} ({listed(names)})" for what, names in (("unknown", more), ("missing", less))]
        raise ValueError(f"{paths[0]} does not fit the network: keys {' and '.join(faults)}")
    if other:
        sizes = listed([f"{name} {list(found[name])} instead of {list(shapes[name])}" for name in other])
        raise ValueError(f"{paths[0]} does not fit the network: {len(other)} of other shapes ({sizes})")


def _header_of(path: Path, metadata: Mapping[str, str]) -> StudentHeader:
    try:
        return StudentHeader.from_metadata(metadata)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _pickle(path: Path) -> ValueError:
    return ValueError(
        f"{path} is a pickle, which can run any program when it is opened: give a .safetensors file "
        "(torch.load(..., weights_only=True), then safetensors.torch.save_file)"
    )


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file; a torn one is told by its name."""
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix in _PICKLES:
        raise _pickle(path)
    try:
        file = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise OSError(f"{path} is no whole safetensors file ({error}): make or copy it again") from error
    with file:
        yield file


def _refuse_not_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    if wrong := [name for name, value in weights.items() if not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{path}: weights are not finite ({listed(wrong)}): train again, or choose a wider dtype")
