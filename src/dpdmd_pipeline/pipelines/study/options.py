"""Options of the study."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]


class RunOptions(BaseModel):
    """One recipe, as changes to the options.

    Attributes:
        train: changes in the group `train`.
        anchors: changes in the group `anchors`. The cache has other anchors, so the teacher draws them in every cycle.
        seeds: training seeds of this run; None takes the study's.
        baseline: run whose lost diversity is this run's gap, trained for the same number of cycles; None takes the
            study's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: dict[str, Any] = {}
    anchors: dict[str, Any] = {}
    seeds: Seeds | None = None
    baseline: str | None = None


class StudyOptions(BaseModel):
    """Recipes to compare.

    Attributes:
        seeds: training seeds of every recipe without its own seeds.
        baseline: run whose lost diversity is the gap of every run without its own baseline.
        runs: recipes by name; null removes a run of conf/base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Seeds
    baseline: str
    runs: dict[str, RunOptions | None]

    @property
    def active_runs(self) -> dict[str, RunOptions]:
        """Runs that are not null."""
        return {name: run for name, run in self.runs.items() if run is not None}

    @property
    def students(self) -> list[tuple[int, str]]:
        """Seed and run of every student: ordered by seed, the study's seeds before those of single runs."""
        seeds = dict.fromkeys([*self.seeds, *(seed for name in self.active_runs for seed in self._seeds_of(name))])
        return [(seed, name) for seed in seeds for name in self.active_runs if seed in self._seeds_of(name)]

    def _seeds_of(self, name: str) -> list[int]:
        own = self.active_runs[name].seeds
        return self.seeds if own is None else own

    def baseline_of(self, name: str) -> str:
        """Baseline of a run."""
        return self.active_runs[name].baseline or self.baseline

    @model_validator(mode="after")
    def _check_baselines(self) -> Self:
        names = ", ".join(self.active_runs)
        if self.baseline not in self.active_runs:
            raise ValueError(f"baseline={self.baseline} is not a run: name one of {names}")
        for name in self.active_runs:
            if (baseline := self.baseline_of(name)) not in self.active_runs:
                raise ValueError(f"runs.{name}.baseline={baseline} is not a run: name one of {names}")
        return self

    @model_validator(mode="after")
    def _check_seeds(self) -> Self:
        """Gaps are compared seed by seed."""
        for name in self.active_runs:
            baseline = self.baseline_of(name)
            seeds = self._seeds_of(baseline)
            if missing := sorted(set(self._seeds_of(name)) - set(seeds)):
                raise ValueError(
                    f"runs.{name} has seeds {missing} that its baseline {baseline} lacks: choose seeds from {seeds}"
                )
        return self
