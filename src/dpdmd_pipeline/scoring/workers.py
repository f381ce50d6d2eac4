"""One preset over sets of pictures, in this process or spread over several, always in the order of the sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

from dpdmd_pipeline.metrics.errors import UnfitError
from dpdmd_pipeline.metrics.measures import Measure, Measured
from dpdmd_pipeline.scoring.preset import Preset, Settings
from dpdmd_pipeline.scoring.scores import Reference, Row
from dpdmd_pipeline.scoring.sets import Fault, PictureSet, of_one_size

IN_THE_REFERENCE = ", in the reference"  # after a kind of fault
_IN_FLIGHT = 4  # sets per process that are computed ahead

Measuring = Callable[[Sequence[PictureSet]], Iterator[Row]]


@dataclass(frozen=True)
class Job:
    """One preset over the judged pictures and their reference."""

    preset: Preset
    rows_of: Measuring  # measures sets, in their order
    sets: Sequence[PictureSet]
    settings: Settings
    reference: Reference | None

    @property
    def judges_the_reference(self) -> bool:
        """True if the judged pictures are the reference itself, such as the teacher's own."""
        return self.reference is not None and self.sets is self.reference.sets


@contextmanager
def workers(settings: Settings) -> Iterator[ProcessPoolExecutor | None]:
    """A pool of processes, started at first use; None if this process does everything."""
    if settings.processes == 1:
        yield None
        return
    with ProcessPoolExecutor(settings.processes, get_context("spawn"), _set_settings, (settings,)) as pool:
        yield pool


def measuring(preset: Preset, settings: Settings, pool: ProcessPoolExecutor | None) -> Measuring:
    """Function from sets to one row each, in their order; each process loads a model once.

    Raises:
        MissingWeightsError, MissingLibraryError: before any picture is read.
    """
    if pool is None:
        return partial(map, partial(measure_set, preset.make(settings), needs_text=preset.needs_text))
    preset.require(settings)
    return partial(_spread, pool, _IN_FLIGHT * settings.processes, preset)


def _spread(pool: ProcessPoolExecutor, at_once: int, preset: Preset, sets: Sequence[PictureSet]) -> Iterator[Row]:
    for start in range(0, len(sets), at_once):
        yield from pool.map(partial(_measure_here, preset), sets[start : start + at_once])


# State of a worker: its settings, and its current measure, so that memory holds one model at a time.
_settings: list[Settings] = []
_current: dict[str, Measure] = {}


def _set_settings(settings: Settings) -> None:
    _settings[:] = [settings]


def _measure_here(preset: Preset, pictures: PictureSet) -> Row:
    if preset.full_name not in _current:
        _current.clear()
        _current[preset.full_name] = preset.make(_settings[0])
    return measure_set(_current[preset.full_name], pictures, preset.needs_text)


def measure_set(measure: Measure, pictures: PictureSet, needs_text: bool = False) -> Row:
    """Load one prompt's pictures and measure them, with a named fault for everything left out."""
    if needs_text and pictures.no_text:
        return Row(pictures.id, Measured({}), 0, [Fault(pictures.no_text, pictures.id)])
    loaded = pictures.load()
    names, images, faults = loaded if measure.any_size else of_one_size(loaded)
    try:
        measured = measure(pictures.text, images) if len(images) >= measure.least else Measured({})
    except UnfitError as error:
        return Row(pictures.id, Measured({}), 0, [*faults, Fault(str(error), pictures.id)], str(error))
    faults = [*faults, *(Fault(measured.why, names[index]) for index in measured.unusable)]
    usable = len(images) - len(measured.unusable)
    if usable < measure.least:
        few = "no usable picture" if measure.least == 1 else f"fewer than {measure.least} usable pictures"
        faults.append(Fault(f"prompt with {few if len(pictures) else 'no picture'}", pictures.id))
    if not measured.values and measured.features is None:
        return Row(pictures.id, measured, 0, faults)
    return Row(pictures.id, measured, usable, faults, sizes=frozenset(image.size for image in images))
