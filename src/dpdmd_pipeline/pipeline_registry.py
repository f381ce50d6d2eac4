"""Project pipelines."""

from __future__ import annotations

from kedro.framework.project import find_pipelines
from kedro.pipeline import Pipeline


def register_pipelines() -> dict[str, Pipeline]:
    """Register the project's pipelines.

    Kedro loads only the folders a command asks for; assembling pipelines in here would break that.

    Returns:
        A mapping from pipeline names to `Pipeline` objects; the default is `distill`, not the sum of all, since
        that would train the teacher anew.
    """
    pipelines = find_pipelines(raise_errors=True)
    pipelines["__default__"] = pipelines.get("distill") or sum(pipelines.values())
    return pipelines
