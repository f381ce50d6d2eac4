"""Options of the study."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator


class RunOptions(BaseModel):
    """One recipe, as what it changes.

    Attributes:
        train: of the group `train`.
        anchors: of the group `anchors`; the cache has others, so such a run asks the teacher in each student turn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: dict[str, Any] = {}
    anchors: dict[str, Any] = {}


class StudyOptions(BaseModel):
    """Which recipes are compared.

    Attributes:
        seeds: every recipe is trained once per seed.
        baseline: the run whose lost diversity is the gap.
        runs: name of a recipe to what it changes; null leaves out a run of conf/base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    baseline: str
    runs: dict[str, RunOptions | None]

    @property
    def kept(self) -> dict[str, RunOptions]:
        """The runs that are not left out."""
        return {name: run for name, run in self.runs.items() if run is not None}

    @model_validator(mode="after")
    def _has_its_baseline(self) -> Self:
        if self.baseline not in self.kept:
            raise ValueError(f"baseline={self.baseline} is none of the runs {', '.join(self.kept)}")
        return self
