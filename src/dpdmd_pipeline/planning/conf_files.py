"""Check of the YAML files of conf/ before Kedro reads them: their structure, without expanding an alias."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml

KINDS = ("catalog", "credentials", "globals", "parameters")  # beginnings of the names that Kedro reads
MAX_VALUES = 100_000  # of one file after its aliases are expanded
_YAML = "tag:yaml.org,2002:"
_KEYS = {f"{_YAML}{kind}" for kind in ("str", "merge", "value")}
_TAGS = _KEYS | {f"{_YAML}{kind}" for kind in ("bool", "float", "int", "map", "null", "seq", "timestamp")}
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _fault(node: yaml.Node, fact: str) -> ValueError:
    return ValueError(f"line {node.start_mark.line + 1}: {fact}")


def refused_files(folders: Iterable[Path]) -> Iterator[str]:
    """One line for each YAML file in environments' folders that Kedro cannot read; it names the file and the line."""
    for folder in folders:
        for path in sorted([*folder.rglob("*.yml"), *folder.rglob("*.yaml")]):
            parts = path.relative_to(folder).parts
            if any(part.startswith(KINDS) for part in parts) and not any(part.startswith(".") for part in parts):
                try:
                    _check(path)
                except RecursionError:
                    yield f"{path}: its values are nested too deeply"
                except (ValueError, OSError) as error:
                    yield f"{path}, {error}"


def _check(path: Path) -> None:
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), _LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"line {mark.line + 1}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    if root is None:
        return
    if not isinstance(root, yaml.MappingNode):
        raise _fault(root, "must have names and their values, as in `name: value`")
    values = _count(root, {})
    if values > MAX_VALUES:
        raise _fault(root, f"its aliases stand for {values} values; write at most {MAX_VALUES}")
    for key, value in root.value:
        if path.stem == "globals" and value.tag not in (f"{_YAML}str", f"{_YAML}null"):
            raise _fault(value, f"{key.value}: must be text; put it into quotes")
        private = key.value.startswith("_") or key.tag != f"{_YAML}str"
        if path.stem.startswith("catalog") and not private and not isinstance(value, yaml.MappingNode):
            raise _fault(value, f"{key.value}: must be a dataset, with `type:` and its options")


def _count(node: yaml.Node, counts: dict[int, int | None]) -> int:
    """Number of values below a node with all aliases expanded, each node visited once; refuses tags and odd keys."""
    if id(node) in counts:
        count = counts[id(node)]
        if count is None:
            raise _fault(node, "an alias stands for a value that holds it")
        return count
    if node.tag not in _TAGS:
        raise _fault(node, f"the tag {node.tag.removeprefix(_YAML)} is not allowed; write plain YAML")
    counts[id(node)] = None
    count = 1
    if isinstance(node, yaml.MappingNode):
        names = set()
        for key, value in node.value:
            if key.tag not in _KEYS:
                shown = key.value if isinstance(key, yaml.ScalarNode) else "of several values"
                raise _fault(key, f"the key {shown} is not text; put it into quotes")
            if key.value in names:
                raise _fault(key, f"{key.value} is written twice")
            names.add(key.value)
            count += _count(value, counts)
    elif isinstance(node, yaml.SequenceNode):
        count += sum(_count(value, counts) for value in node.value)
    counts[id(node)] = count
    return count
