"""A teacher that somebody else has trained: a local diffusers folder, or a model of the hub."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

INDEX = "model_index.json"
TEXT_FILES = ("*.json", "*.txt", "*.model")  # configs and tokenizers; *.model is T5's
WEIGHTS = "*.safetensors"
VARIANTS = "*.fp16*.safetensors"  # the same weights rounded; which precision is used, the options say
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")


class PretrainedModelDataset(AbstractDataset[Any, Path]):
    """A diffusers pipeline by its folder or by its id on the hub; loads the folder's path, never saves.

    Args:
        model: a folder with a model_index.json, or a hub id as in "stabilityai/stable-diffusion-3.5-medium".
        revision: branch, tag or commit of the hub's model; None is its main branch.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(self, *, model: str, revision: str | None = None, metadata: dict[str, Any] | None = None) -> None:
        self.model, self.revision = model, revision
        self.metadata = metadata

    def load(self) -> Path:
        """The folder with its weights; what the hub's cache lacks is downloaded: safetensors, configs, tokenizers.

        Raises:
            OSError: in one line, if the model is missing, gated or incomplete, or the hub cannot be reached.
            ValueError: if `model` is neither a folder nor a hub id.
        """
        return self._folder(with_weights=True)

    def load_configs(self) -> Path:
        """The same folder, of which only configs and tokenizers need be there: a few MB, to refuse early.

        Raises:
            OSError, ValueError: as `load` does.
        """
        return self._folder(with_weights=False)

    def save(self, data: Any) -> None:
        raise ValueError(f"{self.model} is only read: the stage `teacher` trains embedded teachers, leave it out here")

    def _folder(self, *, with_weights: bool) -> Path:
        folder = Path(self.model).expanduser()
        if not folder.is_dir():
            folder = self._download(with_weights)
        check_pipeline_folder(folder, self._remedy(folder), with_weights=with_weights)
        return folder

    def _remedy(self, folder: Path) -> str:
        if folder == Path(self.model).expanduser():
            return "give a whole diffusers pipeline folder"
        return f"run again with a network and without HF_HUB_OFFLINE, or delete {folder} first"

    def _download(self, with_weights: bool) -> Path:
        from huggingface_hub import snapshot_download

        _refuse_path(self.model)
        with _one_line(self.model, self.revision):
            folder = Path(snapshot_download(self.model, revision=self.revision, allow_patterns=[INDEX]))
            kinds = (*TEXT_FILES, WEIGHTS) if with_weights else TEXT_FILES
            # The hub's folders hold more: single-file copies, other frameworks' weights, pictures.
            wanted = [f"{component}/{kind}" for component in _components(folder) for kind in kinds]
            patterns = {"allow_patterns": [INDEX, *wanted], "ignore_patterns": [VARIANTS]}
            return Path(snapshot_download(self.model, revision=self.revision, **patterns))

    def _exists(self) -> bool:
        """Whether it can be had; what stands in the way is raised, since no other stage can mend it."""
        return self.load_configs().is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"model": self.model, "revision": self.revision}


def check_pipeline_folder(folder: Path, remedy: str, *, with_weights: bool) -> None:
    """Hold a folder against its own index: each part with its config and, of networks, all weights.

    Raises:
        OSError: names what is missing, and the remedy.
    """
    for component in _components(folder):
        if not any((folder / component).glob("*.json")):
            raise FileNotFoundError(f"{folder / component} has no config: {remedy}")
        if not with_weights or component.startswith(WITHOUT_WEIGHTS):
            continue
        if missing := _missing_weights(folder / component):
            raise FileNotFoundError(f"{folder / component} has no {missing}: {remedy}")


def _components(folder: Path) -> list[str]:
    """Names of a pipeline's parts that have a folder.

    Raises:
        OSError: if the index is not there or is none.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a diffusers pipeline (a folder with that file)") from None
    except ValueError as error:
        raise OSError(f"{path} is no JSON ({error}): get it again") from error
    # An absent part is [null, null]; options of the pipeline are no lists of two names.
    return [name for name, value in index.items() if isinstance(value, list) and len(value) == 2 and all(value)]


def _missing_weights(folder: Path) -> str | None:
    """What a network's folder lacks of the parts that its index names, or of a whole file."""
    indices = sorted(path for path in folder.glob("*.safetensors.index.json") if ".fp16" not in path.name)
    if indices:
        named = sorted(set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values()))
        return next((name for name in named if not (folder / name).is_file()), None)
    # A link whose file is gone is no file: so a cache looks whose download was broken off.
    return None if any(path.is_file() for path in folder.glob(WEIGHTS)) else WEIGHTS


def _refuse_path(model: str) -> None:
    """A hub id is two words with one stroke between them.

    Raises:
        OSError: if it is meant as a folder, which is not there, or is a file.
    """
    if Path(model).expanduser().is_file():
        raise OSError(
            f"teacher {model} is a single file, a folder is needed: make one with diffusers' "
            f"`StableDiffusionXLPipeline.from_single_file({model!r}).save_pretrained(FOLDER)` "
            "(SD3 and SD3.5: StableDiffusion3Pipeline) and give teacher_model=FOLDER"
        )
    owner, stroke, name = model.partition("/")
    if not (owner and stroke and name) or "/" in name or model.startswith((".", "~")):
        raise FileNotFoundError(f"teacher {model} is no folder here, and no hub id <owner>/<name>: give one of both")


@contextmanager
def _one_line(model: str, revision: str | None) -> Iterator[None]:
    """Make of the hub's errors one line with the model and the remedy; a full disk's error stays what it is."""
    from huggingface_hub import errors

    page = f"https://huggingface.co/{model}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise OSError(
            f"{model} is gated: accept its licence on {page}, then log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise OSError(
            f"{model} is not on the hub, or private: mend the id, or log in with `hf auth login` (or set HF_TOKEN)"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise OSError(f"{model} has no revision {revision!r}: see {page}/commits, or set revision to null") from error
    except errors.HFValidationError as error:
        raise OSError(f"{model!r} is no hub id <owner>/<name>: {' '.join(str(error).split())}") from error
    except errors.LocalEntryNotFoundError as error:
        raise OSError(_unreachable(model, error)) from error
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(error.errno, f"{os.strerror(error.errno)}, {model} does not fit", _cache()) from error
        if not isinstance(error, OSError) and not type(error).__module__.startswith("http"):
            raise
        reason = " ".join(str(error).split())[:200]
        raise OSError(f"{model} could not be downloaded ({reason}): run again, what has come is kept") from error


def _unreachable(model: str, error: Exception) -> str:
    from huggingface_hub import constants

    state = "is not whole in" if type(error).__name__ == "IncompleteSnapshotError" else "is not in"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
    return (
        f"{model} {state} the local cache {_cache()}, and {why}: run once with a network, "
        "or name a local diffusers folder instead"
    )


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)
