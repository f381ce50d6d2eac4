"""Measure one set of pictures: its numbers, and a named fault for everything left out."""

from __future__ import annotations

from typing import NamedTuple

from dpdmd_pipeline.metrics.errors import UnfitError
from dpdmd_pipeline.metrics.measures import Measure, Measured
from dpdmd_pipeline.scoring.sets import Fault, PictureSet, of_one_size


class Row(NamedTuple):
    """The result of one metric on one prompt."""

    id: str
    measured: Measured
    pictures: int  # number of measured pictures
    faults: list[Fault]
    unfit: str = ""  # reason why the metric cannot judge the prompt
    sizes: frozenset[tuple[int, int]] = frozenset()  # sizes of the pictures, width and height


def measure_set(measure: Measure, pictures: PictureSet, needs_text: bool = False) -> Row:
    """Load one prompt's pictures and measure them."""
    if needs_text and pictures.no_text:
        return Row(pictures.id, Measured({}), 0, [Fault(pictures.no_text, pictures.id)])
    loaded = pictures.load()
    names, images, faults = loaded if measure.any_size else of_one_size(loaded)
    faults = list(faults)
    try:
        measured = measure(pictures.text, images) if len(images) >= measure.least else Measured({})
    except UnfitError as error:
        return Row(pictures.id, Measured({}), 0, [*faults, Fault(str(error), pictures.id)], str(error))
    faults += [Fault(measured.why, names[index]) for index in measured.unusable]
    usable = len(images) - len(measured.unusable)
    if usable < measure.least:
        faults.append(Fault(f"prompt with {_too_few(measure, pictures)}", pictures.id))
    if not measured.values and measured.features is None:
        return Row(pictures.id, measured, 0, faults)
    return Row(pictures.id, measured, usable, faults, sizes=frozenset(image.size for image in images))


def _too_few(measure: Measure, pictures: PictureSet) -> str:
    if not len(pictures):
        return "no picture"
    return "no usable picture" if measure.least == 1 else f"fewer than {measure.least} usable pictures"
