"""Nodes of the export stage."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.export.options import ExportOptions
from dpdmd_pipeline.planning.messages import stage_command
from dpdmd_pipeline.wording import made

log = logging.getLogger(__name__)


def export_student(
    student: Path,
    teacher: Path,
    metrics: dict,
    backbone: BackboneOptions,
    options: ExportOptions,
    run_arguments: str,
) -> Callable[[Path], None]:
    """Check the student against the teacher; returns a function that writes every form and the card into a folder."""
    from dpdmd_pipeline.exporting.formats import Export, read_student

    loaded = read_student(student, teacher, backbone.family, backbone.resolution, backbone.max_sequence_length)
    if loaded.header.recipe is None:
        log.warning("export: the card has no recipe: the header of %s names none", student)
    export = Export(
        student=loaded,
        teacher=teacher,
        metrics=_own_metrics(metrics, student),
        measure=stage_command("evaluate,export", run_arguments),
        **options.model_dump(include={"title", "formats", "dtype"}),
        **_origin(teacher, options),
    )
    for form in export.left_out:
        log.info("export: no %s file, the student is of kind %s", form, export.student.header.kind)
    made.info("%s for diffusers, ComfyUI", "adapter" if loaded.header.kind == "lora" else "student")
    return export.write


def _origin(teacher: Path, options: ExportOptions) -> dict[str, Any]:
    """Base model and licence for the card: from the options, or from the environment's own teacher."""
    from dpdmd_pipeline.exporting.formats import Licence, hub_id

    model = hub_id(teacher)
    own_teacher = options.teacher is not None and options.teacher.model == model
    source = options.teacher if options.license is None and own_teacher else options
    if source.license is None:
        log.warning(
            "export: the card has no licence, that of the teacher %s is unknown: set export.license and "
            "export.base_model",
            model or teacher,
        )
    licence = Licence(source.license, source.license_name, source.license_link)
    return {"base_model": options.base_model or model, "licence": licence}


def _own_metrics(metrics: dict, student: Path) -> dict:
    """The metrics, if they were measured on this student; else {}."""
    from dpdmd_pipeline.datasets.model_folder import folder_hash

    measured_hash = metrics.get("dp_dmd", {}).get("model")  # the start of a hash; older metrics have none
    if measured_hash and folder_hash(student).startswith(measured_hash):
        return metrics
    if not metrics:
        reason = "this student was not measured"
    elif measured_hash:
        reason = f"they belong to another student ({measured_hash})"
    else:
        reason = "they come from an older version and name no student"
    log.warning("export: the card has no measurements: %s; run the stages evaluate and export again", reason)
    return {}
