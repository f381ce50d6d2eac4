"""Nodes of the export stage."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.export.options import ExportOptions
from dpdmd_pipeline.training.recipe import Recipe

log = logging.getLogger(__name__)


def export_student(
    student: Path, teacher: Path, metrics: dict, train: Any, backbone: BackboneOptions, options: ExportOptions
) -> Callable[[Path], None]:
    """Read the student, refuse what does not fit, and say how it is written.

    Returns:
        What writes every form and the model card into a folder.
    """
    from dpdmd_pipeline.exporting.folder import Export, read_student

    export = Export(
        student=read_student(student, teacher, backbone.family, backbone.resolution, backbone.max_sequence_length),
        teacher=teacher,
        options={"backbone": backbone.model_dump(mode="json"), "train": _recipe(train).model_dump(mode="json")},
        metrics=_of_this_student(metrics, student),
        **options.model_dump(include={"title", "formats", "dtype"}),
        **_origin(teacher, options),
    )
    for form in export.left_out:
        log.info("export: no %s, the student is of kind %s", form, export.student.header.kind)
    return export.write


def _origin(teacher: Path, options: ExportOptions) -> dict[str, str | None]:
    """Base model and licence as the card tells them: what is given, else what is known of this very teacher."""
    from dpdmd_pipeline.exporting.formats import hub_id

    model, known = hub_id(teacher), options.teacher
    says = known if options.license is None and known and known.model == model else options
    if says.license is None:
        log.warning(
            "export: the card has no licence, that of the teacher %s is not known: give export.license and "
            "export.base_model",
            model or teacher,
        )
    licence = {name: getattr(says, name) for name in ("license", "license_name", "license_link")}
    return {"base_model": options.base_model or model, **licence}


def _of_this_student(metrics: dict, student: Path) -> dict:
    """The metrics if they were measured on this student; {} if none were, on another, or nobody knows on which."""
    from dpdmd_pipeline.datasets.model_folder import folder_hash
    from dpdmd_pipeline.exporting.card import MEASURE

    measured = metrics.get("dp_dmd", {}).get("model")  # the start of a hash; older metrics have none
    if measured and folder_hash(student).startswith(measured):
        return metrics
    log.warning("export: the card has no measurements, %s: `%s` measures this student", _why(metrics), MEASURE)
    return {}


def _why(metrics: dict) -> str:
    if not metrics:
        return "nothing was measured"
    measured = metrics.get("dp_dmd", {}).get("model")
    whose = f"another student ({measured})" if measured else "an older version, which did not note the student"
    return f"the metrics are of {whose}"


def _recipe(train: Any) -> Recipe:
    """What decided the student; in one run with its own stage the group comes as a model, alone as a dict."""
    plain = train if isinstance(train, dict) else train.model_dump()
    return Recipe(**{name: plain[name] for name in Recipe.model_fields})
