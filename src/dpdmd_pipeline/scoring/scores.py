"""The results of all metrics on one folder of pictures, and the pictures that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.rows import Row
from dpdmd_pipeline.scoring.sets import PictureSet


@dataclass
class Reference:
    """Pictures to compare with: the teacher's, or real ones.

    Attributes:
        sets: one set per prompt.
        duplicates: per preset, the number of pictures per prompt and their threshold; filled at first use.
    """

    sets: Sequence[PictureSet]
    duplicates: dict[str, tuple[int, float]] = field(default_factory=dict)


@dataclass
class Scores:
    """All results of one folder of pictures, and everything that is missing.

    Attributes:
        prompts, pictures: numbers of prompts and pictures, usable or not.
        figures: figures by full name, as in `diversity.dino_v2.vendi`.
        per_prompt: values by full name and id of the prompt, for prompts that could be measured.
        missing: reasons by name, for requested metrics that could not be measured.
        faults: names of files and prompts that figures leave out, by kind of fault.
        notes: remarks for the reader.
        usable: number of measured pictures by metric and id of the prompt.
        weights: SHA-256 by metric and name of its weights.
    """

    prompts: int
    pictures: int
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    per_prompt: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    usable: dict[str, dict[str, int]] = field(default_factory=dict)
    weights: dict[str, dict[str, str]] = field(default_factory=dict)
    _unique_faults: set[tuple[str, str]] = field(default_factory=set, repr=False)

    def add_faults(self, rows: Sequence[Row], preset: Preset, where: str = "") -> None:
        """Add the faults of rows; faults of a network carry the metric's name.

        Args:
            rows: rows of some sets.
            preset: metric of the rows.
            where: location of the sets, unless they are the judged ones.
        """
        for row in rows:
            for kind, name in row.faults:
                metric = f" ({preset.full_name})" if "network" in kind else ""
                self._add_fault(f"{kind}{metric}{where}", name)

    def _add_fault(self, kind: str, name: str) -> None:
        if (kind, name) not in self._unique_faults:
            self._unique_faults.add((kind, name))
            self.faults.setdefault(kind, []).append(name)

    def join(self, other: Scores) -> None:
        """Add the results of other presets on the same pictures."""
        self.figures |= other.figures
        self.per_prompt |= other.per_prompt
        self.missing |= other.missing
        self.usable |= other.usable
        self.weights |= other.weights
        for kind, names in other.faults.items():
            for name in names:
                self._add_fault(kind, name)
        for text in other.notes:
            self.note(text)

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)
