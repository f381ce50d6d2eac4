"""Kedro's configuration loader, for which the DMD baseline follows `train` on the command line as in the files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from dpdmd_pipeline.planning.conf_files import refused_files
from dpdmd_pipeline.wording import one_line, short

BASELINE_KEYS = ("anchored_steps", "diversity_weight", "stop_gradient")  # the differences between DP-DMD and DMD


class ConfigLoader(OmegaConfigLoader):
    """OmegaConfigLoader whose runtime parameters of `train` also reach `train_dmd`, except for its own three keys.

    It refuses YAML files that Kedro cannot read, or would expand without end, in one line each.
    """

    def __init__(
        self,
        conf_source: str,
        env: str | None = None,
        runtime_params: dict[str, Any] | None = None,
        *,
        base_env: str = "base",
        default_run_env: str = "local",
        **kwargs: Any,
    ) -> None:
        folders = dict.fromkeys(Path(conf_source) / name for name in (base_env, env or default_run_env))
        if lines := [*refused_files(folders)]:
            raise click.ClickException("\n  ".join(lines))
        kwargs |= {"base_env": base_env, "default_run_env": default_run_env}
        try:
            super().__init__(conf_source, env, with_baseline(runtime_params or {}), **kwargs)
        except Exception as error:  # whatever the YAML and OmegaConf libraries raise
            raise click.ClickException(f"globals.yml of {conf_source} cannot be read: {one_line(error)}") from error


def run_folder(name: str) -> str:
    """Folder of a run below its environment's folders; `.` for a run without a name.

    Raises:
        ValueError: if the name is not a file name of plain characters.
    """
    if name != "" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", str(name)):
        raise ValueError(f"run = {short(repr(name), 80)}: give up to 64 letters, digits, dots, dashes and underscores")
    return f"runs/{name}" if name != "" else "."


def with_baseline(parameters: dict[str, Any]) -> dict[str, Any]:
    """Copy runtime parameters of `train` to `train_dmd`; what is given for `train_dmd` itself wins."""
    train, baseline = parameters.get("train"), parameters.get("train_dmd", {})
    if not isinstance(train, dict) or not isinstance(baseline, dict):
        return parameters
    shared = {key: value for key, value in train.items() if key not in BASELINE_KEYS}
    if not shared:
        return parameters
    return {**parameters, "train_dmd": OmegaConf.to_container(OmegaConf.merge(shared, baseline))}
