"""The words for errors: the thing, its value and the remedy in one line, with commands for the run's environment."""

from __future__ import annotations

import errno
import os
import shlex
import traceback
from pathlib import Path

from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.publishing import REMEDIES
from dpdmd_pipeline.wording import one_line

PACKAGE = Path(__file__).parents[1]
AGAIN = "then run the same command again: finished work is kept"
DEFAULT_ENVIRONMENTS = {None, "base", "local"}  # commands do not name these
# Errors of torch.save and safetensors carry the system's reason in their text only.
_TEXTS = {os.strerror(number): number for number in REMEDIES}
_TEXTS |= {"PytorchStreamWriter failed writing": errno.ENOSPC, "unexpected pos": errno.ENOSPC}


def run_arguments(env: str | None, run: str | None) -> str:
    """Arguments of `kedro run` that choose the folders of a run, each with a space after it: `--env sd35 `."""
    environment = "" if env in DEFAULT_ENVIRONMENTS else f"--env {shlex.quote(env)} "
    return environment + (f"--params run={shlex.quote(run)} " if run else "")


def stage_command(stages: str, arguments: str = "") -> str:
    """`kedro run --env sd35 --pipelines prompts`, with backticks; see `run_arguments`."""
    return f"`kedro run {arguments}--pipelines {stages}`"


def describe(error: BaseException, arguments: str = "") -> str:
    """The error in one line; the command follows where it names a stage."""
    line = one_line(error)
    return f"{line}: run {stage_command(error.stage, arguments)}" if isinstance(error, StageError) else line


def error_line(error: BaseException, dataset: str = "", arguments: str = "") -> str | None:
    """One line for an error that a user can mend; None for a bug.

    A user can mend what the disk refuses, what a dataset cannot read, and what this package refuses by itself.

    Args:
        error: as it left a node or a dataset, in Kedro's wrapping or without.
        dataset: being read or written, for errors that do not name a file.
        arguments: of the run, for commands; see `run_arguments`.
    """
    from kedro.io import DatasetError

    cause = error
    while isinstance(cause, DatasetError) and (cause.__cause__ or cause.__context__):
        cause = cause.__cause__ or cause.__context__
    if line := _disk_line(cause, dataset):
        return line
    if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError":
        return f"out of memory: {one_line(cause) or type(cause).__name__}; lower the batch size, {AGAIN}"
    if isinstance(cause, OSError) and not isinstance(cause, StageError):
        name = cause.filename or dataset
        return f"{name}: {cause.strerror}" if cause.strerror and name else one_line(cause)
    if "Failed while loading data" in str(error) and isinstance(cause, ValueError) and not _is_ours(cause):
        return f"{dataset or 'a dataset'} cannot be read: {one_line(cause)}; delete it, {AGAIN}"
    # Other types from our frames (TypeError, KeyError, RuntimeError of torch) are bugs.
    mendable = isinstance(cause, ValueError | FloatingPointError) or type(cause).__name__ == "SafetensorError"
    return describe(cause, arguments) if mendable and _is_ours(cause) else None


def _disk_line(error: BaseException, dataset: str) -> str | None:
    """The line for a full or closed disk."""
    number = getattr(error, "errno", None)
    if "inline_container" in str(error) or type(error).__name__ == "SafetensorError":
        number = next((number for text, number in _TEXTS.items() if text in str(error)), None)
    name = getattr(error, "filename", None) or dataset or "a file"
    return f"{name}: {os.strerror(number)} ({REMEDIES[number]})" if number in REMEDIES else None


def _is_ours(error: BaseException) -> bool:
    """True if the innermost frame is in this package."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and Path(frames[-1].f_code.co_filename).is_relative_to(PACKAGE)
