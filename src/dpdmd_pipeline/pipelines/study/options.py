"""Options of the study."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator


class StudyOptions(BaseModel):
    """Which recipes are compared.

    Attributes:
        seeds: every recipe is trained once per seed.
        baseline: the run whose lost diversity is the gap.
        runs: name of a recipe to what it changes in the group `train`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)]
    baseline: str
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]

    @model_validator(mode="after")
    def _has_its_baseline(self) -> Self:
        if self.baseline not in self.runs:
            raise ValueError(f"baseline={self.baseline} is none of the runs {', '.join(self.runs)}")
        return self
