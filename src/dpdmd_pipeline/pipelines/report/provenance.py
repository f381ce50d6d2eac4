"""Options and versions behind the page."""

from collections.abc import Iterable, Mapping
from typing import Any

from dpdmd_pipeline.pipelines.report.wording import DASH

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "kedro", "kedro-datasets", "dvc")


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


def option_tables(groups: Mapping[str, dict[str, str]]) -> list[dict[str, Any]]:
    """One table per stage; the two students side by side, with their differences marked."""
    tables = []
    for name, group in groups.items():
        if name == "train_dmd":
            continue
        columns = {"DP-DMD": group, "DMD": groups["train_dmd"]} if name == "train" else {"": group}
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
    from importlib.metadata import PackageNotFoundError, version

    from dpdmd_pipeline import __version__

    installed = {"dpdmd-pipeline": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:  # some wheels have no metadata
            installed[package] = "not installed"
    return {**installed, "platform": platform.platform()}
