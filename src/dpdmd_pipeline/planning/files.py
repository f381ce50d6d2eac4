"""Checks of a run's files: inputs that are missing, folders that cannot be written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpdmd_pipeline.planning.messages import AGAIN, error_line, stage_command
from dpdmd_pipeline.publishing import link_target

RAW_FILES = ("raw_prompts", "raw_eval_prompts")  # the prompts stage knows which of them it needs


def missing_inputs(pipeline: Any, catalog: Any, project: Path, arguments: str) -> Iterator[str]:
    """One line for each input that neither a file nor an earlier node provides; ValueError if a dataset is broken."""
    missing = [name for name in sorted(pipeline.inputs()) if not _exists(name, catalog, arguments)]
    stages = _stages_by_output() if any(not name.startswith("params:") for name in missing) else {}
    for name in missing:
        if name.startswith("params:"):
            group = name.removeprefix("params:")
            yield f"{group}: no such parameter group: write it into conf/base/parameters_{group}.yml"
        elif name in stages:
            yield f"missing {label(name, catalog, project)}: run {stage_command(stages[name], arguments)} first"
        else:
            yield f"missing {label(name, catalog, project)}: put it there, or name another in conf or --params"


def _exists(name: str, catalog: Any, arguments: str) -> bool:
    if name not in catalog:
        return False
    if name in RAW_FILES or getattr(catalog.get(name), "optional", False):
        return True
    try:
        return name.startswith("params:") or name == "parameters" or catalog.exists(name)
    except Exception as error:
        line = error_line(error, name, arguments)
        if line is None:
            raise
        raise ValueError(line) from error


def _stages_by_output() -> dict[str, str]:
    """Dataset -> the stage that makes it; loads all pipelines."""
    from kedro.framework.project import pipelines

    pipelines.set_requested(None)
    stages = sorted(pipelines.items(), key=lambda item: -len(item[1].nodes))
    return {dataset: name for name, stage in stages for dataset in stage.all_outputs() if name != "__default__"}


def unwritable_folders(pipeline: Any, catalog: Any, project: Path) -> Iterator[str]:
    """One line for each folder in which an output cannot be written; OSError for a link that leads to itself."""
    paths = {name: path for name in pipeline.all_outputs() if (path := _filepath(name, catalog))}
    # A folder is written where its link leads; a file replaces its link.
    paths |= {name: link_target(path) for name, path in paths.items() if hasattr(catalog.get(name), "_folders")}
    for folder in sorted({next(folder for folder in path.parents if folder.exists()) for path in paths.values()}):
        if not os.access(folder, os.W_OK):
            yield f"{_relative(folder, project)} is not writable: change its permissions or its disk, {AGAIN}"


def label(name: str, catalog: Any, project: Path) -> str:
    """`prompts (data/03_primary/prompts.jsonl)`."""
    path = _filepath(name, catalog)
    return f"{name} ({_relative(path, project)})" if path else name


def _filepath(name: str, catalog: Any) -> Path | None:
    path = getattr(catalog.get(name), "_filepath", None) if name in catalog else None
    return Path(path) if path else None


def _relative(path: Path, project: Path) -> Path:
    return path.relative_to(project) if path.is_relative_to(project) else path
