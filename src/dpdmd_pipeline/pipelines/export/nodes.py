"""Nodes of the export stage."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.export.options import ExportOptions

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
        options={"backbone": _plain(backbone), "train": _plain(train)},
        metrics=metrics,
        **options.model_dump(),
    )
    for form in export.left_out:
        log.info("export: no %s, the student is of kind %s", form, export.student.header.kind)
    return export.write


def _plain(group: Any) -> dict[str, Any]:
    """Options as plain values; in one run with their own stage they come as a model, alone as a dict."""
    return group.model_dump(mode="json") if hasattr(group, "model_dump") else group
