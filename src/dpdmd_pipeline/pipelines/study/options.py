"""Options of the study."""

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from dpdmd_pipeline.backbones.options import PromptNoise, TeacherStart
from dpdmd_pipeline.bounds import Seed, StrictModel

Seeds = Annotated[list[Seed], Field(min_length=1)]


class RunOptions(StrictModel):
    """One recipe, as changes to the options, and how its students draw; seeds and baseline of None are the study's.

    Own anchors are not in the cache, so the teacher draws them in every cycle. A baseline is trained for as many cycles
    as the run.
    """

    train: dict[str, Any] = {}  # changes in the group `train`
    anchors: dict[str, Any] = {}  # changes in the group `anchors`
    teacher_start: TeacherStart | None = None  # the teacher takes the first steps of a picture
    prompt_noise: PromptNoise | None = None  # noise in the prompt during the first step
    seeds: Seeds | None = None  # training seeds
    baseline: str | None = None  # run whose lost diversity is this run's gap

    @property
    def start(self) -> TeacherStart | PromptNoise | None:
        """Replacement of the student's first steps, if any."""
        return self.teacher_start or self.prompt_noise

    @model_validator(mode="after")
    def _check_start(self) -> Self:
        if self.teacher_start and self.prompt_noise:
            raise ValueError("a run has teacher_start or prompt_noise, not both")
        return self


class StudyOptions(StrictModel):
    """Recipes to compare, by name; seeds and baseline are for the runs without their own."""

    seeds: Seeds
    baseline: str
    runs: dict[str, RunOptions | None]  # null removes a run of conf/base

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
        return self.active_runs[name].seeds or self.seeds

    @model_validator(mode="after")
    def _check_baselines(self) -> Self:
        """Gaps are compared seed by seed, so a baseline needs the seeds of its runs."""
        names = ", ".join(self.active_runs)
        if self.baseline not in self.active_runs:
            raise ValueError(f"baseline={self.baseline} is not a run: name one of {names}")
        for name, run in self.active_runs.items():
            baseline = run.baseline or self.baseline
            if baseline not in self.active_runs:
                raise ValueError(f"runs.{name}.baseline={baseline} is not a run: name one of {names}")
            seeds = self._seeds_of(baseline)
            if missing := sorted(set(self._seeds_of(name)) - set(seeds)):
                raise ValueError(
                    f"runs.{name} has seeds {missing} that its baseline {baseline} lacks: choose seeds from {seeds}"
                )
        return self
