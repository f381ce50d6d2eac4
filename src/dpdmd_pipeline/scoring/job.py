"""One preset to run over the judged pictures and their reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import PictureSet
from dpdmd_pipeline.scoring.workers import Measuring

IN_THE_REFERENCE = ", in the reference"


@dataclass(frozen=True)
class Job:
    """One preset over the judged pictures and their reference.

    Attributes:
        preset: metric to run.
        rows_of: measures sets, in their order.
        sets: judged sets, one per prompt.
        settings: settings of all metrics.
        reference: pictures to compare with, if any.
    """

    preset: Preset
    rows_of: Measuring
    sets: Sequence[PictureSet]
    settings: Settings
    reference: Reference | None

    @property
    def judges_the_reference(self) -> bool:
        """True if the judged pictures are the reference itself, such as the teacher's own."""
        return self.reference is not None and self.sets is self.reference.sets
