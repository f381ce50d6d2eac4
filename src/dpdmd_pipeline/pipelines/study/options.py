"""Options of the study."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

Seeds = Annotated[list[NonNegativeInt], Field(min_length=1)]


class RunOptions(BaseModel):
    """One recipe, as what it changes.

    Attributes:
        train: of the group `train`.
        anchors: of the group `anchors`; the cache has others, so such a run asks the teacher in each student turn.
        seeds: of this run alone; None takes the study's.
        baseline: the run whose lost diversity is this one's gap, as one of as many turns; None takes the study's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    train: dict[str, Any] = {}
    anchors: dict[str, Any] = {}
    seeds: Seeds | None = None
    baseline: str | None = None


class StudyOptions(BaseModel):
    """Which recipes are compared.

    Attributes:
        seeds: every recipe is trained once per seed, unless it has seeds of its own.
        baseline: the run whose lost diversity is the gap, of all runs that name no other.
        runs: name of a recipe to what it changes; null leaves out a run of conf/base.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    seeds: Seeds
    baseline: str
    runs: dict[str, RunOptions | None]

    @property
    def kept(self) -> dict[str, RunOptions]:
        """The runs that are not left out."""
        return {name: run for name, run in self.runs.items() if run is not None}

    @property
    def students(self) -> list[tuple[int, str]]:
        """Seed and run of every student, seed after seed: the study's, then those that only some runs have."""
        every = dict.fromkeys([*self.seeds, *(seed for name in self.kept for seed in self._seeds_of(name))])
        return [(seed, name) for seed in every for name in self.kept if seed in self._seeds_of(name)]

    def _seeds_of(self, name: str) -> list[int]:
        own = self.kept[name].seeds
        return self.seeds if own is None else own

    def baseline_of(self, name: str) -> str:
        """The run that a run is compared with."""
        return self.kept[name].baseline or self.baseline

    @model_validator(mode="after")
    def _has_its_baselines(self) -> Self:
        if self.baseline not in self.kept:
            raise ValueError(f"baseline={self.baseline} is none of the runs {', '.join(self.kept)}")
        for name in self.kept:
            if (baseline := self.baseline_of(name)) not in self.kept:
                raise ValueError(f"runs.{name}.baseline={baseline} is none of the runs {', '.join(self.kept)}")
        return self

    @model_validator(mode="after")
    def _has_the_baselines_at_every_seed(self) -> Self:
        """A share of the gap is of one seed's own gap."""
        for name in self.kept:
            baseline = self.baseline_of(name)
            compared = self._seeds_of(baseline)
            if missing := sorted(set(self._seeds_of(name)) - set(compared)):
                raise ValueError(
                    f"runs.{name} has the seeds {missing}: give it seeds of {compared}, which its baseline {baseline} "
                    "is trained with"
                )
        return self
