"""The results of metrics on one prompt and on one folder of pictures, and the pictures that it is compared with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from dpdmd_pipeline.metrics.measures import Measured
from dpdmd_pipeline.scoring.preset import Preset
from dpdmd_pipeline.scoring.sets import Fault, PictureSet
from dpdmd_pipeline.wording import counted, listed

_FEW = 3  # prompts in a note


class Row(NamedTuple):
    """The result of one metric on one prompt."""

    id: str
    measured: Measured
    pictures: int  # number of measured pictures
    faults: list[Fault]
    unfit: str = ""  # reason why the metric cannot judge the prompt
    sizes: frozenset[tuple[int, int]] = frozenset()  # sizes of the pictures, width and height


@dataclass
class Reference:
    """Pictures to compare with: the teacher's, or real ones.

    Per preset, `duplicates` has the number of pictures per prompt and their threshold; it is filled at first use.
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
        """Add the faults of rows; faults of a network carry the metric's name, those of the reference its location."""
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
        for name in ("figures", "per_prompt", "missing", "usable", "weights"):
            getattr(self, name).update(getattr(other, name))
        for kind, names in other.faults.items():
            for name in names:
                self._add_fault(kind, name)
        for text in other.notes:
            self.note(text)

    def note_sizes(self, rows: Sequence[Row], where: str = "") -> str:
        """Note prompts whose pictures differ from the most frequent size, and return that size; empty without any."""
        counts = Counter(size for row in rows for size in row.sizes)
        if not counts:
            return ""
        common = counts.most_common(1)[0][0]
        text = "{} x {}".format(*common)
        others = [row.id for row in rows if row.sizes - {common}]
        if others:
            prompts = counted(len(others), "prompt")
            self.note(f"{prompts} with pictures of another size than most ({text}){where}: {listed(others, _FEW)}")
        return text

    def note(self, text: str) -> None:
        """Add a note once."""
        if text not in self.notes:
            self.notes.append(text)
