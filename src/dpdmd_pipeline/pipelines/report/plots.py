"""What the page draws, as rows that `dvc plots` draws: it reads those alone that all have the same keys."""

from collections.abc import Mapping, Sequence
from typing import Any

from dpdmd_pipeline.pipelines.report.charts import scatter_points
from dpdmd_pipeline.pipelines.report.wording import MODELS


def turn_rows(runs: Mapping[str, Sequence[dict]], key: str) -> list[dict[str, Any]]:
    """Something of the histories: a row per turn at which it was measured, a column per model.

    Args:
        runs: histories by model.
        key: what; the teacher's is `<key>_teacher`, where it was measured too.
    """
    rows: dict[int, dict[str, Any]] = {}
    for model, history in runs.items():
        for row in history:
            if row.get(key) is not None:
                of_turn = rows.setdefault(row["step"], {"step": row["step"], **dict.fromkeys(MODELS.values())})
                of_turn |= {MODELS[model]: row[key], MODELS["teacher"]: row.get(f"{key}_teacher")}
    return [rows[step] for step in sorted(rows)]


def prompt_rows(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The page's scatter: a row per prompt and model, its quality in the model's own column; empty without one."""
    x_name, y_name, points = scatter_points(scores) or ("", "", [])
    told = {"diversity_is": x_name, "quality_is": y_name}
    empty = dict.fromkeys(MODELS.values())
    return [{"prompt": text, "diversity": x, **empty, MODELS[model]: y, **told} for model, x, y, text in points]
