"""A teacher that somebody else trained: a diffusers folder, a single file, or a model on the Hugging Face hub."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kedro.io import AbstractDataset

from dpdmd_pipeline.backbones.built_teacher import Lora, build, stamp
from dpdmd_pipeline.limits import read_json, write_json
from dpdmd_pipeline.publishing import Folders, replacing

log = logging.getLogger(__name__)

INDEX = "model_index.json"
TEXT_FILES = ("*.jinja", "*.json", "*.txt", "*.model")  # configs, tokenizers, chat templates; *.model is T5's
WEIGHTS = "*.safetensors"
VARIANTS = "*.fp16*.safetensors"  # the same weights, rounded; options decide the precision
WEIGHT_NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
WITHOUT_WEIGHTS = ("scheduler", "tokenizer", "feature_extractor", "image_processor")


class PretrainedModelDataset(AbstractDataset[Any, Path]):
    """A diffusers pipeline by its folder, its id on the hub or its single file; loads the folder's path, never saves.

    Args:
        model: a folder with a model_index.json, a hub id as in "stabilityai/stable-diffusion-3.5-medium", or a file in
            the layout of the model's authors.
        revision: branch, tag or commit on the hub; None is the main branch.
        config: folder or hub id of a pipeline with the configs of a single file, and the parts that it lacks.
        lora: file that is fused into the weights, and a factor: `style.safetensors@0.8`.
        filepath: folder for the pipeline that is made from a single file or a LoRA; the newest one is kept.
        metadata: ignored; for Kedro plugins.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None = None,
        config: str | None = None,
        lora: str | None = None,
        filepath: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.revision, self.config, self.lora = model, revision, config, lora
        self.folder, self.metadata = filepath and Path(filepath), metadata

    @property
    def is_local(self) -> bool:
        """True if no weight has to be downloaded."""
        return Path(self.model).expanduser().exists()

    def load(self) -> Path:
        """Path of the folder with its weights; downloads the safetensors, configs and tokenizers that are missing.

        Raises an OSError or ValueError of one line if the model is missing, gated or incomplete, the hub cannot be
        reached, or a single file or LoRA does not fit.
        """
        return self._whole()

    def load_configs(self) -> Path:
        """Path of the same folder, where weights may still be missing: a few MB are enough to check a run early."""
        if self.lora:
            Lora.parse(self.lora)
        return self._whole() if self.is_local else self._folder(with_weights=False)

    def missing_bytes(self) -> int:
        """Bytes of weights that loading will download; 0 if the hub cannot be asked."""
        if Path(self.model).expanduser().is_dir():
            return 0
        try:
            files = self._download(with_weights=True, dry_run=True)
        except OSError:
            return 0
        return sum(file.file_size or 0 for file in files if file.will_download)

    def save(self, data: Any) -> None:
        raise ValueError(f"{self.model} is read-only: leave out the stage `teacher`, which trains embedded teachers")

    def _whole(self) -> Path:
        source = Path(self.model).expanduser()
        if not source.is_file():
            source = self._folder(with_weights=True)
        return self._built(source) if source.is_file() or self.lora else source

    def _built(self, source: Path) -> Path:
        """Folder of the pipeline from a single file or with a LoRA; made again if one of its files has changed."""
        lora, config = self.lora and Lora.parse(self.lora), source
        if not self.folder:
            raise ValueError(f"teacher {self.model} has to be converted: give its dataset a filepath")
        if source.is_file():
            if not self.config or Path(self.config).is_file():
                remedy = "give teacher_config=FOLDER, a diffusers folder of this family with its configs and tokenizers"
                raise ValueError(f"teacher {source} is a single file, which has no configs: {remedy}")
            config = PretrainedModelDataset(model=self.config, revision=self.revision)._folder(with_weights=False)
        files = [*stamp(source), *stamp(config)], lora and [*stamp(lora.path), lora.scale]
        name, record = source.name.removesuffix(".safetensors"), self.folder / "made_from.json"
        made_from = json.loads(json.dumps({"files": files}))
        if not record.is_file() or read_json(record) != made_from:
            log.info("teacher: %s is converted into %s", self.model, self.folder)
            with replacing(Folders.of(self.folder)) as folder:
                build(folder / name, source, config, lora)
                write_json(folder / record.name, made_from)
        return self.folder / name

    def _folder(self, *, with_weights: bool) -> Path:
        folder, remedy = Path(self.model).expanduser(), "give a whole diffusers pipeline folder"
        if not folder.is_dir():
            folder = self._download(with_weights)
            remedy = f"run again with a network and without HF_HUB_OFFLINE, or delete {folder} first"
        for component, (library, _) in components(folder).items():
            if not any((folder / component).glob("*.json")):
                raise FileNotFoundError(f"{folder / component} has no config: {remedy}")
            try:
                _ = weight_files(folder / component, library) if with_weights else []
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}: {remedy}") from None
        return folder

    def _download(self, with_weights: bool, *, dry_run: bool = False) -> Any:
        """Path of the folder in the hub's cache; with `dry_run` the hub's facts about every file."""
        from huggingface_hub import snapshot_download

        _check_hub_id(self.model)
        with _hub_errors_in_one_line(self.model, self.revision):
            folder = Path(snapshot_download(self.model, revision=self.revision, allow_patterns=[INDEX]))
            kinds = (*TEXT_FILES, WEIGHTS) if with_weights else TEXT_FILES
            # Repositories hold more: single-file copies, other frameworks' weights, pictures.
            patterns = [INDEX, *(f"{component}/{kind}" for component in components(folder) for kind in kinds)]
            options = {"allow_patterns": patterns, "ignore_patterns": [VARIANTS]}
            result = snapshot_download(self.model, revision=self.revision, dry_run=dry_run, **options)
            return result if dry_run else Path(result)

    def _exists(self) -> bool:
        """True if the configs can be loaded; otherwise raises the reason, which no other stage can mend."""
        return self.load_configs().is_dir()

    def _describe(self) -> dict[str, Any]:
        return {"model": self.model, "revision": self.revision, "lora": self.lora}


def hub_cache() -> Path:
    """Folder of everything that was downloaded from the hub."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


# ---- a pipeline's folder


def components(folder: Path) -> dict[str, tuple[str, str]]:
    """Components of a pipeline that have a folder; library and class that each is loaded with."""
    path = folder / INDEX
    try:
        index = read_json(path)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist: give a diffusers pipeline (a folder with that file)") from None
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list | dict)}
    for name, entry in entries.items():
        is_pair = isinstance(entry, list) and len(entry) == 2 and {type(word) for word in entry} <= {str, type(None)}
        if not (is_pair and name.isidentifier()):
            raise OSError(f"{path}: {name!r:.80} is {entry!r:.80}, expected [library, class] or [null, null]")
    return {name: (library, kind) for name, (library, kind) in entries.items() if library and kind}


def weight_files(folder: Path, library: str) -> list[Path]:
    """Files that `from_pretrained(use_safetensors=True)` opens for a component; none if it is not a network.

    Raises:
        FileNotFoundError: if one is missing; variants, pickles and files of other names do not replace it.
    """
    if folder.name.startswith(WITHOUT_WEIGHTS) or library not in WEIGHT_NAMES:
        return []
    name = WEIGHT_NAMES[library]
    index = folder / f"{name}.index.json"
    names = {name}
    if index.is_file() and not (folder / name).is_file():
        names = set(_weight_map(index).values())
    for name in sorted(names):
        if not (folder / name).is_file():  # an interrupted download leaves dangling links in the cache
            others = sorted(path.name for path in folder.glob("*") if path.suffix in (".safetensors", ".bin"))
            raise FileNotFoundError(f"{folder} has no {name}" + (f", only {', '.join(others[:3])}" if others else ""))
    return [folder / name for name in sorted(names)]


def _weight_map(index: Path) -> dict[str, str]:
    """Weight name -> file in the folder of an index."""
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(n, str) and Path(n).name == n for n in weights.values()):
        raise OSError(f"{index} has no weight_map of names and files beside it: download it again")
    return weights


# ---- errors of the hub


def _check_hub_id(model: str) -> None:
    owner, slash, name = model.partition("/")
    if not (owner and slash and name) or "/" in name or model.startswith((".", "~")):
        raise FileNotFoundError(
            f"teacher {model} is neither a folder here, a file nor a hub id <owner>/<name>: give one"
        )


@contextmanager
def _hub_errors_in_one_line(model: str, revision: str | None) -> Iterator[None]:
    """Turn the hub's errors into one line with the model and the remedy; a full disk stays a full disk."""
    from huggingface_hub import constants

    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            text = f"{os.strerror(error.errno)}, {model} does not fit"
            raise OSError(error.errno, text, str(constants.HF_HUB_CACHE)) from error
        if (line := _hub_error_line(error, model, revision)) is None:
            raise
        raise OSError(line) from error


def _hub_error_line(error: Exception, model: str, revision: str | None) -> str | None:
    """One line for an error of the hub's client; None for other errors."""
    from huggingface_hub import constants, errors

    page, login = f"https://huggingface.co/{model}", "log in with `hf auth login` (or set HF_TOKEN)"
    reason = " ".join(str(error).split())
    match error:
        case errors.GatedRepoError():
            return f"{model} is gated: accept its licence on {page}, then {login}"
        case errors.RepositoryNotFoundError():
            return f"{model} does not exist on the hub, or is private: correct the id, or {login}"
        case errors.RevisionNotFoundError():
            return f"{model} has no revision {revision!r}: see {page}/commits, or set revision to null"
        case errors.HFValidationError():
            return f"{model!r} is no hub id <owner>/<name>: {reason}"
        case errors.LocalEntryNotFoundError():
            cause = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub cannot be reached"
            cache = f"the local cache {constants.HF_HUB_CACHE}"
            return f"{model} is not completely in {cache}, and {cause}: run once with a network, or name a local folder"
    if isinstance(error, OSError) or type(error).__module__.startswith("http"):
        return f"{model} could not be downloaded ({reason[:200]}): run again, finished files are kept"
    return None
