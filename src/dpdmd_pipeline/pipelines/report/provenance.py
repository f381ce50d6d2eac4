"""Options and versions behind the page."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines.report.wording import DASH

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "kedro", "kedro-datasets", "dvc")


def student_options(students: Mapping[str, Path], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Parameter groups that decided the students (folders of `dmd` and `dp_dmd`), from their headers if they name them.

    DMD's training is `train_dmd`, all else is DP-DMD's.
    """
    from dpdmd_pipeline.backbones.student_file import load_header

    groups: dict[str, Any] = {}
    for model, folder in students.items():
        header = load_header(folder)
        measured = metrics[model].get("student")
        if measured != header.identity:
            names = [(identity or "none")[:8] for identity in (measured, header.identity)]
            raise StageError(
                "the metrics belong to another student than {}: they name {}, its header {}".format(folder, *names),
                stage="evaluate",
            )
        recipe = header.recipe or {}
        if model == "dmd":
            recipe = {"train_dmd": recipe["train"]} if "train" in recipe else {}
        groups |= recipe
    return groups


def plain_options(group: Any) -> dict[str, str]:
    """Flatten options into sorted dotted names with their values as text.

    Kedro passes a model if another stage of the run declares the group's type, and a dict otherwise; both give the
    same text.
    """
    if hasattr(group, "model_dump"):
        group = group.model_dump(mode="json", exclude_unset=True)
    return dict(sorted(_flat("", group)))


def _flat(name: str, value: Any) -> Iterable[tuple[str, str]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flat(f"{name}.{key}" if name else str(key), inner)
    elif isinstance(value, list | tuple) and any(isinstance(inner, Mapping | list | tuple) for inner in value):
        for number, inner in enumerate(value, 1):
            yield from _flat(f"{name} {number}", inner)
    else:
        yield name, ", ".join(map(_scalar, value)) if isinstance(value, list | tuple) else _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)  # as in YAML


def option_tables(groups: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One table per parameter group; the two students side by side, with their differences marked."""
    options = {name: plain_options(group) for name, group in groups.items()}
    train_dmd = options.pop("train_dmd", {})
    tables = []
    for name, group in options.items():
        columns = {"DP-DMD": group, "DMD": train_dmd} if name == "train" else {"": group}
        keys = sorted({key for column in columns.values() for key in column})
        rows = [(key, [column.get(key, DASH) for column in columns.values()]) for key in keys]
        tables.append({
            "name": name,
            "columns": list(columns),
            "rows": [{"name": key, "values": values, "differs": len(set(values)) > 1} for key, values in rows],
        })  # fmt: skip
    return tables


def versions() -> dict[str, str]:
    """Versions of this package, Python, the main libraries and the platform."""
    import platform

    from dpdmd_pipeline import __version__
    from dpdmd_pipeline.metrics.libraries import versions as library_versions

    own = {"dpdmd-pipeline": __version__, "Python": platform.python_version()}
    installed = {name: version or "not installed" for name, version in library_versions(PACKAGES).items()}
    return {**own, **installed, "platform": platform.platform()}
