"""Check before a run that every part of the teacher can be read: the files that the libraries open, and only those."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.networks import load_part
from dpdmd_pipeline.backbones.tensor_files import open_tensors
from dpdmd_pipeline.datasets.pretrained import INDEX, components, weight_files
from dpdmd_pipeline.wording import one_line


def unreadable_parts(pipeline: Any, catalog: Any) -> list[str]:
    """One line for each part of the run's teacher that cannot be read. A download is checked without its weights."""
    if "teacher" not in pipeline.inputs() or "teacher" not in catalog:
        return []
    teacher = catalog.get("teacher")
    is_local = not hasattr(teacher, "load_configs") or Path(teacher.model).expanduser().is_dir()
    folder = teacher.load_configs() if hasattr(teacher, "load_configs") else teacher.load()
    return [*faulty_parts(folder, with_weights=is_local)] if (folder / INDEX).is_file() else []


def faulty_parts(folder: Path, *, with_weights: bool) -> Iterator[str]:
    """One line for each tokenizer or network of a pipeline's folder that cannot be read; opens headers only."""
    for part, library in components(folder).items():
        try:
            if part.startswith("tokenizer"):
                _check_tokenizer(folder / part)
            elif with_weights:
                _check_weights(folder / part, library)
        except FileNotFoundError as error:
            yield f"{error}: save the whole teacher with `save_pretrained(FOLDER)`, without a variant"
        except (ValueError, OSError, RuntimeError) as error:  # the last for other shapes
            yield one_line(error)


def _check_weights(folder: Path, library: str) -> None:
    """Check that a network's files are complete and have all its weights, which stay on the disk."""
    paths = weight_files(folder, library)
    for path in paths:
        with open_tensors(path):
            pass
    if paths:
        load_part(*json.loads((folder.parent / INDEX).read_text("utf-8"))[folder.name], folder)


def _check_tokenizer(folder: Path) -> None:
    """Check that transformers can convert a tokenizer that only has its SentencePiece model."""
    from transformers.utils import is_protobuf_available, is_sentencepiece_available

    models = sorted(path.name for path in folder.glob("*.model"))
    if not models or (folder / "tokenizer.json").is_file():
        return
    if not (is_sentencepiece_available() and is_protobuf_available()):
        raise ValueError(
            f"{folder} has {models[0]} alone: `pip install sentencepiece protobuf`, or save it as tokenizer.json"
        )
