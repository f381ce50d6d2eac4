"""Checks of the configuration: environments, pipelines, parameter groups and options."""

from __future__ import annotations

import copy
import difflib
import importlib
import pkgutil
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dpdmd_pipeline.wording import one_line, short

_PROBE = "runtime-parameter"
_NO_TEXT = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # control characters, and bytes that are not UTF-8


def unknown_environment(conf: Path, env: str | None) -> str | None:
    """The line for an environment without a folder in `conf`, or with one that has no globals.yml."""
    environments = environments_of(conf)
    if not env or not conf.is_dir() or env in ("local", *environments):  # conf may be an archive, which Kedro opens
        return None
    names = f"{nearest(env, environments, ':')} choose one of {', '.join(environments)}"
    return f"no environment {env!r}, a folder with a globals.yml, in {conf.name}/{names}"


def environments_of(conf: Path) -> list[str]:
    """Names of the environments: folders with a globals.yml. A parent has none."""
    return sorted(path.parent.name for path in conf.glob("*/globals.yml"))


def shared_folder(loader: Any) -> str | None:
    """The line for an environment that would write its results over those of another one."""
    env, base = loader.env, _only_base(loader)
    folder, base_folder = loader["globals"].get("folder"), base["globals"].get("folder")
    if env in (None, "local", loader.base_env) or base_folder is None or folder != base_folder:
        return None
    return (
        f"conf/{env}/globals.yml: folder = {folder!r} is the folder of {loader.base_env}, whose results this run would "
        f"replace: set folder: {env}"
    )


def requested_pipelines() -> dict[str, Any]:
    """The pipelines of this run: Kedro loads no others. ValueError if there is none of that name."""
    from kedro.framework.project import pipelines

    try:
        return dict(pipelines)
    except ImportError as error:
        names = re.search(r"'(.+)\.pipelines\.(.+)' module", str(error))
        if error.__cause__ is not None or not names:
            raise  # a fault inside the pipeline's module
        modules = pkgutil.iter_modules(importlib.import_module(f"{names[1]}.pipelines").__path__)
        available = ", ".join(module.name for module in modules if module.ispkg)
        raise ValueError(f"no pipeline {names[2]!r}: choose one of {available}") from error


def refused_options(loader: Any, pipelines: dict[str, Any]) -> Iterator[str]:
    """One line for each unknown parameter group and each option that its pydantic model refuses."""
    from kedro.validation.type_extractor import TypeExtractor
    from pydantic import BaseModel, ValidationError

    parameters, groups = loader["parameters"], set(_only_base(loader)["parameters"])
    for name in sorted(set(parameters) - groups):
        if line := _refused_name(loader, name, groups):
            yield line
    share = parameters["prompts"].get("eval_share") if isinstance(parameters.get("prompts"), dict) else None
    if share is not None and "raw_eval_prompts" in loader.runtime_params:
        yield f"raw_eval_prompts: prompts.eval_share={share} takes the prompts from raw_prompts: give one of both"
    train = loader.runtime_params.get("train")
    unread = _unread_rates(train, parameters["train"].get("roles")) if isinstance(train, dict) else {}
    yield from unread.values()
    lines: list[str] = []
    for group, model in sorted(TypeExtractor(pipelines).extract_types_from_pipelines().items()):
        if group not in parameters or not (isinstance(model, type) and issubclass(model, BaseModel)):
            continue
        try:
            model.model_validate(parameters[group])
        except ValidationError as error:
            faults = error.errors(include_url=False)
            lines += [
                _option_line(group, model, fault)
                for fault in faults
                if (group.removesuffix("_dmd"), *fault["loc"]) not in unread
            ]
    # The baseline copies the options of `train`: one line tells both.
    yield from (line for line in lines if line == (own := line.replace("train_dmd.", "train.", 1)) or own not in lines)


def _unread_rates(train: dict[str, Any], roles: Any) -> dict[tuple[str, ...], str]:
    """Lines for learning rates on the command line that belong to the other kind of roles, by their option."""
    names = "learning_rate", "lora_learning_rate"
    unread, read = names if roles == "lora" else reversed(names)
    optimizers = {role: train[role] for role in ("student", "fake_score") if isinstance(train.get(role), dict)}
    lines = {}
    for role, rates in optimizers.items():
        if unread in rates:
            option = f"train.{role}.{unread} = {rates[unread]!r}"
            lines["train", role, unread] = f"{option}: train.roles={roles} does not read it: set train.{role}.{read}"
    return lines


def _refused_name(loader: Any, name: str, groups: set[str]) -> str | None:
    """The line for a parameter outside the groups; None for a path that the catalog of this environment reads."""
    is_given = name in loader.runtime_params  # on the command line
    if is_given and _datasets_reading(loader, name, loader.env):
        return _no_path(name, loader.runtime_params[name])
    environments = environments_of(Path(loader.conf_source)) if is_given else []
    readers = {env: datasets for env in environments if (datasets := _datasets_reading(loader, name, env))}
    if not readers:
        otherwise = f"; the groups are {', '.join(sorted(groups))}"
        return f"{name}: unknown parameter group{nearest(name, groups, otherwise)}"
    env, dataset = loader.env or loader.base_env, next(iter(readers.values()))[0]
    return f"{name}: environment {env} has its own {dataset}; {name} is for --env {', '.join(readers)}"


def _no_path(name: str, value: Any) -> str | None:
    """The line for a value that is not the text of a path."""
    if isinstance(value, str) and value and not _NO_TEXT.search(value):
        return None
    hint = f"; a file of this name is ./{value}" if type(value) in (int, float) else ""
    return f"{name} = {short(repr(value), 80)}: must be a path{hint}"


def _datasets_reading(loader: Any, name: str, env: str | None) -> list[str]:
    """Datasets whose resolved entry holds a runtime parameter, in one environment's catalog."""
    probe = type(loader)(
        loader.conf_source,
        env=env,
        runtime_params={name: _PROBE},
        base_env=loader.base_env,
        default_run_env=loader.default_run_env,
    )
    return [dataset for dataset, entry in probe["catalog"].items() if _PROBE in repr(entry)]


def _only_base(loader: Any) -> Any:
    """The loader for conf/base alone; other environments and --params may only fill its groups."""
    base = copy.copy(loader)
    base.env, base.runtime_params = base.base_env, {}
    return base


def _option_line(group: str, model: type, fault: dict[str, Any]) -> str:
    """`train.learning_rate = -1: must be greater than 0`."""
    path, value = ".".join([group, *map(str, fault["loc"])]), short(repr(fault["input"]), 80)
    if fault["type"] == "missing":
        return f"{path}: missing"
    if fault["type"] == "extra_forbidden":
        options = _field_names(model, fault["loc"][:-1])
        otherwise = f"; there are {', '.join(options)}" if options else ""
        return f"{path} = {value}: unknown option{nearest(str(fault['loc'][-1]), options, otherwise)}"
    reason = fault["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    reason = short(one_line(re.sub(r"^Input should (be|have) ", r"must \1 ", reason)), 600)
    return f"{path}: {reason}" if isinstance(fault["input"], dict) else f"{path} = {value}: {reason}"


def _field_names(model: Any, loc: tuple[Any, ...]) -> list[str]:
    """Names of the options at `loc` inside a model; none if the path leads through something else."""
    for name in loc:
        field = getattr(model, "model_fields", {}).get(name)
        model = field.annotation if field else None
    return list(getattr(model, "model_fields", {}))


def nearest(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """`; did you mean 'train'?`, or `otherwise` if no name is close."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {close[0]!r}?" if close else otherwise
