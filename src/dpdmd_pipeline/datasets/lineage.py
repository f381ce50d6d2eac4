"""What was made from what: hashes of texts, teachers and code, and whether a cache belongs to what it is used with."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dpdmd_pipeline.publishing import sha256

_PACKAGE = Path(__file__).parents[1]
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


def network_folder(teacher: Path) -> Path:
    """Where a diffusers pipeline folder keeps its denoising network.

    Raises:
        FileNotFoundError: if it has none.
    """
    for name in ("transformer", "unet"):
        if (teacher / name).is_dir():
            return teacher / name
    raise FileNotFoundError(f"teacher {teacher} has no transformer/ and no unet/: give a diffusers pipeline folder")


def texts_digest(prompts: Iterable[dict]) -> str:
    """SHA-256 of the prompts' texts in their order."""
    digest = hashlib.sha256()
    for record in prompts:
        digest.update(record["text"].encode() + b"\n")
    return digest.hexdigest()


def text_side_hash(teacher: Path) -> str:
    """SHA-256 of the names and contents of everything in a teacher that turns text into embeddings.

    Raises:
        FileNotFoundError: if the folder has no text encoder and no tokenizer.
    """
    found = (path for kind in ("text_encoder*", "tokenizer*") for path in teacher.glob(f"{kind}/**/*"))
    paths = sorted(path for path in found if path.is_file())
    if not {"text_encoder", "tokenizer"} <= {path.relative_to(teacher).parts[0] for path in paths}:
        raise FileNotFoundError(
            f"teacher {teacher} has no text_encoder/ or no tokenizer/: give a diffusers pipeline folder, "
            "or run `kedro run --pipelines teacher`"
        )
    # A missing T5 becomes zeros whose width stands in the transformer's config.
    paths += [path for path in [teacher / "transformer" / "config.json"] if path.is_file()]
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.relative_to(teacher).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()


def check_embeddings(embeddings: Any, prompts: Iterable[dict], teacher: Path) -> None:
    """Hold embeddings against the prompts and the teacher they are used with.

    Raises:
        ValueError: if they are of other prompts or of other text encoders; row i would be another prompt's.
    """
    now = {"texts": texts_digest(prompts), "teacher_text": text_side_hash(teacher)}
    names = {"texts": "prompts", "teacher_text": "text encoders"}
    for key, value in now.items():
        if embeddings.manifest.get(key) != value:
            raise ValueError(
                f"the embeddings are of other {names[key]} ({str(embeddings.manifest.get(key))[:8]}, now {value[:8]}): "
                "run `kedro run --pipelines prompts` again"
            )


def code_hash(*places: str) -> str:
    """SHA-256 of what the code of some files or folders of this package does: comments and layout do not count.

    Args:
        places: relative to the package, as in ``dpdmd`` or ``training/distill.py``.
    """
    digest = hashlib.sha256()
    for place in places:
        path = _PACKAGE / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, _DOCUMENTED) and ast.get_docstring(node) is not None:
                    node.body = node.body[1:]
            digest.update(f"{file.relative_to(_PACKAGE).as_posix()}\0{ast.dump(tree)}\n".encode())
    return digest.hexdigest()
