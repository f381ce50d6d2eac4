"""Errors that name the stage which must run; they carry facts, and the command line words the command."""

from __future__ import annotations

from typing import Any


class StageError(ValueError):
    """An input is missing, out of date or unusable until a pipeline stage makes it again.

    Args:
        fact: the problem with its values, without a command.
        stage: the Kedro pipeline that makes the input, as in ``prompts``.
    """

    def __init__(self, fact: str, stage: str) -> None:
        super().__init__(fact)
        self.fact, self.stage = fact, stage

    def __str__(self) -> str:
        return self.fact

    def __reduce__(self) -> tuple[Any, ...]:  # errors cross processes by pickle
        return type(self), (self.fact, self.stage)


class MissingInputError(StageError, FileNotFoundError):
    """A file or folder that a stage of the line makes does not exist."""
