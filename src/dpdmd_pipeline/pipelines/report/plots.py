"""Rows for `dvc plots`, which reads only rows with the same keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.pipelines.report.charts import scatter_points
from dpdmd_pipeline.pipelines.report.wording import MODELS


def cycle_rows(runs: Mapping[str, Sequence[dict]], key: str) -> list[dict[str, Any]]:
    """One measurement of the histories: a row per cycle that has it, a column per model.

    Args:
        runs: histories by model.
        key: measurement; the teacher's is `<key>_teacher`, where it exists.
    """
    rows: dict[int, dict[str, Any]] = {}
    for model, history in runs.items():
        for record in history:
            if record.get(key) is not None:
                row = rows.setdefault(record["step"], {"step": record["step"], **dict.fromkeys(MODELS.values())})
                row |= {MODELS[model]: record[key], MODELS["teacher"]: record.get(f"{key}_teacher")}
    return [rows[step] for step in sorted(rows)]


def prompt_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points of the page's scatter: a row per prompt and model, with the quality in the model's own column."""
    x_name, y_name, points = scatter_points(scores) or ("", "", [])
    axes = {"diversity_is": x_name, "quality_is": y_name}
    empty = dict.fromkeys(MODELS.values())
    return [{"prompt": text, "diversity": x, **empty, MODELS[model]: y, **axes} for model, x, y, text in points]
