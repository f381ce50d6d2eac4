"""Which weights a metric needs, and what to tell who lacks them. Nothing is ever downloaded here.

Sizes are of the files as published, rounded; licences as their pages name them.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shlex
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NoReturn

from dpdmd_pipeline.publishing import sha256

_OLD_CHECKPOINT = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save's magic number, pickled
_LONGEST = 200  # characters of another library's error


class UnavailableError(OSError):
    """A metric that cannot be measured here, with the reason and the remedy in one line."""


class MissingWeightsError(UnavailableError):
    """The weights of a metric are not on this disk."""


class DamagedWeightsError(UnavailableError):
    """The weights of a metric are on this disk, and cannot be read."""


class MissingLibraryError(UnavailableError):
    """The library of a metric is not installed."""


class UnfitError(ValueError):
    """A prompt, or pictures, that a metric's network or reader cannot judge; it can others."""


@dataclass(frozen=True)
class Weights:
    """Published weights, and where they belong below the folder of all weights.

    Attributes:
        folder: name below the root.
        files: which must be there; a tuple inside means that one of them is enough.
        source: where they are published.
        licence: of the weights.
        size_mb: of the files, about.
        fetch: shell command that brings them; `{folder}` is their place.
    """

    folder: str
    files: tuple[str | tuple[str, ...], ...]
    source: str
    licence: str
    size_mb: int
    fetch: str

    def require(self, folder: Path, metric: str) -> Path:
        """The folder, if all files are there.

        Args:
            folder: where they should be; `folder` below the root, or elsewhere.
            metric: that needs them.

        Raises:
            MissingWeightsError: names the metric, the files, their licence and size, and the command.
        """
        absent = [" or ".join(names) for names in map(_names, self.files) if not _any_there(folder, names)]
        if absent:
            raise MissingWeightsError(
                f"{metric} needs {self.source} ({self.licence}, about {self.size_mb} MB): "
                f"{', '.join(absent)} not in {folder}; fetch with: {self.command(folder)}"
            )
        return folder

    def digest(self, folder: Path) -> str:
        """SHA-256 of the contents of the files that are there, and of the shards that an index names; hexadecimal."""
        digest = hashlib.sha256()
        for name in sorted(self._present(folder)):
            state = (folder / name).stat()
            digest.update(f"{name}\0{_sha256(folder / name, state.st_size, state.st_mtime_ns)}\n".encode())
        return digest.hexdigest()

    def damage(self, folder: Path) -> str | None:
        """The first file that is cut off or no file of its kind, with the remedy; None where all look whole."""
        for name in sorted(self._present(folder)):
            why = damage_of(folder / name)
            if why:
                return f"{folder / name} is damaged ({why}): delete it and fetch it again: {self.command(folder)}"
        return None

    def command(self, folder: Path) -> str:
        """What brings the files, to be pasted into a shell."""
        return self.fetch.format(folder=shlex.quote(str(folder)))

    def _present(self, folder: Path) -> set[str]:
        found = {name for names in map(_names, self.files) for name in names if (folder / name).is_file()}
        for index in [name for name in found if name.endswith(".index.json")]:
            found |= {name for name in _shards(folder / index) if (folder / name).is_file()}
        return found


@cache
def _sha256(file: Path, size: int, mtime_ns: int) -> str:
    """Of a file in this state: gigabytes are read once, however many metrics and models ask."""
    return sha256(file)


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _any_there(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() and (folder / name).stat().st_size for name in names)


def _shards(index: Path) -> list[str]:
    """Files that an index names; none of a damaged one, of which its own content must speak."""
    try:
        return list(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def damage_of(file: Path) -> str | None:
    """Why a file cannot be one of its kind: an unfinished download, a page in its place. Not all damage shows."""
    from safetensors import SafetensorError, safe_open

    try:
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix in {".pt", ".pth", ".bin"}:
            return _checkpoint_damage(file)
    except (ValueError, EOFError, RuntimeError, zlib.error, SafetensorError, zipfile.BadZipFile) as error:
        return " ".join(str(error).split())
    return None


def _checkpoint_damage(file: Path) -> str | None:
    """Of a file of torch.save or torch.jit.save: an archive, or in old ones a row of pickles."""
    import torch

    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            spoilt = archive.testzip()
        return spoilt and f"{spoilt} in it is not what was written"
    with file.open("rb") as opened:
        if opened.read(len(_OLD_CHECKPOINT)) != _OLD_CHECKPOINT:
            return "cut off, or no checkpoint of PyTorch"
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except (
        AttributeError,
        EOFError,
        LookupError,
        RuntimeError,
        TypeError,
        struct.error,
        pickle.UnpicklingError,
    ) as error:
        return " ".join(str(error).split())[:_LONGEST]
    return None


# Big models come in shards with an index.
MODEL_FILE = ("model.safetensors", "model.safetensors.index.json")


def hub_model(folder: str, source: str, licence: str, size_mb: int, *more: str) -> Weights:
    """A transformers model with its preprocessing, as the Hub has it; not its weights in other formats."""
    files = ("config.json", ("preprocessor_config.json", "processor_config.json"), MODEL_FILE, *more)
    others = " ".join(f"--exclude '{ending}'" for ending in ("*.bin", "*.h5", "*.msgpack", "*.onnx"))
    fetch = f"hf download {source} --local-dir {{folder}} {others}"
    return Weights(folder, files, source, licence, size_mb, fetch)


def url_file(folder: str, url: str, licence: str, size_mb: int, before: str = "") -> Weights:
    """One file of an address, and what else its reader needs `before`."""
    name = url.rsplit("/", 1)[1]
    return Weights(folder, (name,), url, licence, size_mb, f"{before}curl -fL --create-dirs -o {{folder}}/{name} {url}")


DINO_V2 = hub_model("dinov2-base", "facebook/dinov2-base", "Apache-2.0", 346)
DINO_V3 = hub_model(
    "dinov3-vitl16", "facebook/dinov3-vitl16-pretrain-lvd1689m", "DINOv3 licence, access on request", 1213
)
CLIP_L = Weights(
    "clip-vit-large-patch14-openclip",
    ("open_clip_config.json", ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")),
    "timm/vit_large_patch14_clip_224.openai",
    "MIT",
    1710,
    "hf download timm/vit_large_patch14_clip_224.openai --local-dir {folder} --include 'open_clip*' "
    "--include '*token*' --include vocab.json --include merges.txt --exclude '*.bin'",
)
CLIP_L_HF = hub_model("clip-vit-large-patch14", "openai/clip-vit-large-patch14", "MIT", 1710)
CLIP_SHAPES = Weights(
    "shapes_clip",
    ("open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"),
    "the embedded world",
    "Apache-2.0",
    1,
    "kedro run --pipelines clip  # a minute of one core; git has it too",
)
PICKSCORE = hub_model("pickscore", "yuvalkirstain/PickScore_v1", "see its model card", 3945, "tokenizer_config.json")
HPS_V2_1 = Weights(
    "hps_v2.1",
    ("HPS_v2.1_compressed.pt",),
    "xswu/HPSv2",
    "Apache-2.0",
    1972,
    "hf download xswu/HPSv2 HPS_v2.1_compressed.pt --local-dir {folder}",
)
QWEN_VL = hub_model("qwen2.5-vl-7b", "Qwen/Qwen2.5-VL-7B-Instruct", "Apache-2.0", 16600, "tokenizer_config.json")
VISUALQUALITY_R1 = hub_model(
    "visualquality-r1-7b", "TianheWu/VisualQuality-R1-7B", "MIT", 16600, "tokenizer_config.json"
)
INCEPTION = url_file(
    "inception",
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "Apache-2.0",
    96,
)
# torch.hub's own layout: torchvision and torchmetrics look for their files there.
HUB = "hub/checkpoints"
ALEXNET = url_file(HUB, "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "BSD-3-Clause", 244)
SQUEEZENET = url_file(HUB, "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth", "BSD-3-Clause", 5)
_ARNIQA = "https://github.com/miccunifi/ARNIQA/releases/download/weights"
ARNIQA = url_file(HUB, f"{_ARNIQA}/ARNIQA.pth", "Apache-2.0", 110)
ARNIQA_KONIQ = url_file(HUB, f"{_ARNIQA}/regressor_koniq10k.pth", "Apache-2.0", 1)

# pyiqa keeps its files beside torch.hub's.
_PYIQA = "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main"
_pyiqa_file = partial(url_file, "hub/pyiqa", before="pip install 'dpdmd-pipeline[iqa]' && ")
MANIQA = _pyiqa_file(f"{_PYIQA}/MANIQA_PIPAL-ae6d356b.pth", "Apache-2.0", 544)
TOPIQ = _pyiqa_file(f"{_PYIQA}/cfanet_nr_koniq_res50-9a73138b.pth", "PolyForm-Noncommercial-1.0.0", 140)
CLIPIQA_PLUS = _pyiqa_file(f"{_PYIQA}/CLIP-IQA%2B_learned_prompts-603f3273.pth", "see pyiqa", 1)
# CLIP-IQA+ learned its prompts for this CLIP, which its own file lacks.
_OPENAI = "https://openaipublic.azureedge.net/clip/models"
CLIP_RN50 = url_file(
    "hub/clip", f"{_OPENAI}/afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762/RN50.pt", "MIT", 256
)


@contextmanager
def hub_folder(root: Path) -> Iterator[None]:
    """Let torch.hub find its checkpoints below `root`, and nothing fetch any, for as long as a model is being built."""
    import torch

    before = torch.hub.get_dir()
    torch.hub.set_dir(str(Path(root) / "hub"))
    try:
        with _nothing_fetched():
            yield
    finally:
        torch.hub.set_dir(before)


@contextmanager
def _nothing_fetched() -> Iterator[None]:
    """Refuse what torch.hub, pyiqa and the Hub's client would download: of a file that is not as published, too."""
    import urllib.request

    import torch
    from huggingface_hub import constants

    doors = ((torch.hub, "urlopen", _refuse), (urllib.request, "urlopen", _refuse), (constants, "HF_HUB_OFFLINE", True))
    before = [getattr(module, name) for module, name, _ in doors]
    for module, name, closed in doors:
        setattr(module, name, closed)
    try:
        yield
    finally:
        for (module, name, _), opened in zip(doors, before, strict=True):
            setattr(module, name, opened)


def _refuse(request: Any, *args: Any, **options: Any) -> NoReturn:
    address = getattr(request, "full_url", request)
    raise UnavailableError(f"{address} is not there as published, and nothing is fetched here: fetch it again")
