"""Identity of inputs, students and code, and the folders of checkpoints, each of which belongs to one identity."""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.sharded import fingerprint
from dpdmd_pipeline.errors import MissingInputError, StageError
from dpdmd_pipeline.publishing import files_hash, folder_size, sha256, write_atomically
from dpdmd_pipeline.training.recipe import Recipe
from dpdmd_pipeline.wording import differences, reuse_refusal

log = logging.getLogger(__name__)

RECORD = "options.json"  # the options that decide a state's identity

_ROOT = Path(__file__).parents[2]
_PACKAGE = "dpdmd_pipeline"
# Modules that store, check, word or start processes: no number that a run computes comes from them.
_NO_RESULT = ("bounds", "datasets", "planning", "errors", "publishing", "wording")
_NO_RESULT += ("training.checkpoint", "training.launch")


def texts_digest(prompts: Iterable[dict]) -> str:
    """SHA-256 of the prompts' texts in order, hexadecimal."""
    digest = hashlib.sha256()
    for record in prompts:
        digest.update(record["text"].encode() + b"\n")
    return digest.hexdigest()


def text_side_hash(teacher: Path) -> str:
    """SHA-256 of a teacher's text encoders and tokenizers (names and contents), hexadecimal.

    Raises:
        MissingInputError: if the folder has no text encoder or no tokenizer.
    """
    paths = [
        path for kind in ("text_encoder*", "tokenizer*") for path in teacher.glob(f"{kind}/**/*") if path.is_file()
    ]
    if not {"text_encoder", "tokenizer"} <= {path.relative_to(teacher).parts[0] for path in paths}:
        raise MissingInputError(
            f"teacher {teacher} has no text_encoder/ or no tokenizer/: give a diffusers pipeline folder", "teacher"
        )
    # A missing T5 becomes zeros; the transformer's config has their width.
    paths += [path for path in [teacher / "transformer" / "config.json"] if path.is_file()]
    return files_hash(teacher, paths)


def check_embeddings(embeddings: Any, prompts: Iterable[dict], teacher: Path) -> None:
    """Compare embeddings with the prompts and the teacher of this run.

    Raises:
        StageError: if they belong to other prompts or other text encoders: row i would be another prompt's.
    """
    digests = (("texts", "prompts", texts_digest(prompts)), ("teacher_text", "text encoders", text_side_hash(teacher)))
    for key, name, digest in digests:
        if (recorded := str(embeddings.manifest.get(key))) != digest:
            fact = f"the embeddings belong to other {name} ({recorded[:8]}, this run has {digest[:8]})"
            raise StageError(fact, "prompts")


def student_identity(recipe: Recipe, backbone: BackboneOptions, anchors: Any, rows: list[int]) -> str:
    """Identity of a student: recipe, teacher settings, anchors, training prompts and code, hexadecimal."""
    unread = {"lora"} if recipe.roles == "full" else set()
    unread |= {"watch"} if recipe.watch.keep == "last" else set()
    unread |= set() if recipe.start_from else {"start_from", "fake_score_from"}
    facts = {name: value for name, value in recipe_facts(recipe).items() if name not in unread}
    code = code_hash("pipelines.train.setup", f"backbones.{backbone.family}")
    return fingerprint(facts, backbone.model_dump(mode="json"), anchors.fingerprint, rows, code)


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe for JSON; a warm start goes by its file's name and the start of its hash.

    Raises:
        OSError: if that file is missing.
    """
    from dpdmd_pipeline.backbones.start import start_file

    options = recipe.model_dump(mode="json")
    if recipe.start_from:
        file = start_file(Path(recipe.start_from))
        status = file.stat()
        options["start_from"] = f"{file.name} {_file_hash(file, status.st_size, status.st_mtime_ns)[:16]}"
    return options


@cache
def _file_hash(file: Path, *_: int) -> str:
    return sha256(file)


# ---- folders of checkpoints


def state_folder(states: Path, identity: str) -> Path:
    """Folder of the checkpoints of one identity, among those of all."""
    return states / identity[:16]


def open_state(states: Path, identity: str, name: str, options: Mapping[str, Any], last: int | None = None) -> Path:
    """Make a run's folder of checkpoints; if it is new, warn of an unfinished one with other options or code.

    Args:
        states: folder of all states.
        identity: of the run.
        name: of what is trained; states of other names are other work.
        options: nested and JSON-able, all that decides the identity but the code.
        last: step after which the work is finished; None if it has several parts.
    """
    folder = state_folder(states, identity)
    if (folder / RECORD).is_file():
        return folder
    if not folder.exists() and (unfinished := _unfinished(states, name)):
        other, progress, record = unfinished[-1]
        changes = [*differences(record["options"], options)]
        log.warning("%s: %s", name, reuse_refusal(f"{other} after {progress}", folder_size(other), changes))
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"name": name, "last": last, "options": options})
    temporary = folder / f"{RECORD}.{os.getpid()}.tmp"  # several machines may write it
    write_atomically(folder / RECORD, lambda path: path.write_text(text), temporary)
    return folder


def _unfinished(states: Path, name: str) -> list[tuple[Path, str, dict[str, Any]]]:
    """Folder, progress and record of each unfinished state of a name, the newest last."""
    unfinished = []
    for path in sorted(states.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime):
        with suppress(ValueError, OSError, KeyError, TypeError):  # a damaged record tells nothing
            record = json.loads(path.read_text())
            step = max((int(file.stem[5:]) for file in path.parent.rglob("step_*.json")), default=0)
            if record["name"] == name and step and step != record["last"]:
                of = f" of {record['last']}" if record["last"] else ""
                unfinished.append((path.parent, f"step {step}{of}", record))
    return unfinished


# ---- code


@cache
def code_hash(*modules: str) -> str:
    """SHA-256 of the code that some modules run: they and all modules of this package that they import.

    Comments, layout, docstrings, log lines and the texts of errors do not count; neither do modules that only store,
    check or word things.

    Args:
        modules: names in this package, as in ``training.distill``. A module that is imported by a computed name, such
            as a model family, must be named.
    """
    digest = hashlib.sha256()
    for name, path in sorted(_import_closure(modules).items()):
        behaviour = _WithoutWords().visit(ast.parse(path.read_text(encoding="utf-8")))
        digest.update(f"{name}\0{ast.dump(behaviour)}\n".encode())
    return digest.hexdigest()


def _import_closure(modules: Iterable[str]) -> dict[str, Path]:
    """Module names in this package and their files: the given ones and everything that they import."""
    closure: dict[str, Path] = {}
    queue = [f"{_PACKAGE}.{module}" for module in modules]
    while queue:
        name = queue.pop()
        path = _module_file(name)
        if path is None or name in closure or _has_no_result(name):
            continue
        closure[name] = path
        queue += _imported_names(ast.parse(path.read_text(encoding="utf-8")))
    return closure


def _has_no_result(name: str) -> bool:
    return f"{name}.".startswith(tuple(f"{_PACKAGE}.{module}." for module in _NO_RESULT))


def _module_file(name: str) -> Path | None:
    """The file of a module below the root package; None for names that are not modules, and for the root itself."""
    if not name.startswith(f"{_PACKAGE}."):
        return None
    stem = _ROOT.joinpath(*name.split("."))
    return next((path for path in (stem.with_suffix(".py"), stem / "__init__.py") if path.is_file()), None)


def _imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class _WithoutWords(ast.NodeTransformer):
    """Remove what changes no result: docstrings, log lines, and the texts of errors."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST:  # noqa: N802
        match node.value:
            case ast.Constant(value=str()) | ast.Call(func=ast.Attribute(value=ast.Name(id="log"))):
                return ast.Pass()
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:  # noqa: N802
        return ast.Raise()
