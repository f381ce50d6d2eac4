"""Kedro's configuration loader with a parent that environments share, and the DMD baseline as changes of `train`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from dpdmd_pipeline.planning.conf_files import refused_files
from dpdmd_pipeline.wording import one_line, short


class ConfigLoader(OmegaConfigLoader):
    """OmegaConfigLoader that merges base, the parent that an environment extends, and the environment.

    `extends` in an environment's globals.yml names the parent: base, or a folder with catalog and parameters.
    The group `train_dmd` holds changes only: its other options are those of `train`, from the command line too.
    YAML files that Kedro cannot read, or would expand without end, are refused in one line each.
    """

    def __init__(
        self, conf_source: str, env: str | None = None, runtime_params: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        kwargs = {"base_env": "base", "default_run_env": "local"} | kwargs
        _refuse_unreadable(conf_source, kwargs["base_env"], env or kwargs["default_run_env"])
        try:
            super().__init__(conf_source, env, runtime_params, **kwargs)
        except Exception as error:  # whatever the YAML and OmegaConf libraries raise
            raise click.ClickException(f"globals.yml of {conf_source} cannot be read: {one_line(error)}") from error
        self.parent = self._globals.get("extends") or self.base_env
        if self.parent != self.base_env:
            _refuse_parent(Path(conf_source), self.parent)
            _refuse_unreadable(conf_source, self.parent)

    def __getitem__(self, key: str) -> dict[str, Any]:
        config = super().__getitem__(key)
        if key == "parameters" and all(isinstance(config.get(group), dict) for group in ("train", "train_dmd")):
            merged = OmegaConf.merge(config["train"], config["train_dmd"])
            return config | {"train_dmd": OmegaConf.to_container(merged)}
        return config

    def _merge_configs(self, config: dict[str, Any], env_config: dict[str, Any], key: str, env_path: str) -> Any:
        if key != "globals" and self.parent != self.base_env:
            path = self._get_conf_env_path(self.parent)
            shared = self.load_and_merge_dir_config(path, self.config_patterns[key], key, set())
            config = super()._merge_configs(config, shared, key, path)
        return super()._merge_configs(config, env_config, key, env_path)


def run_folder(name: str) -> str:
    """Folder of a run below its environment's folders; `.` for a run without a name.

    Raises:
        ValueError: if the name is not a file name of plain characters.
    """
    if name != "" and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", str(name)):
        raise ValueError(f"run = {short(repr(name), 80)}: give up to 64 letters, digits, dots, dashes and underscores")
    return f"runs/{name}" if name != "" else "."


def _refuse_unreadable(conf_source: str, *folders: str) -> None:
    if lines := [*refused_files(dict.fromkeys(Path(conf_source) / name for name in folders))]:
        raise click.ClickException("\n  ".join(lines))


def _refuse_parent(conf: Path, parent: str) -> None:
    """Refuse a parent without a folder, and an environment as one: what that one extends would be left out."""
    is_environment = (conf / parent / "globals.yml").exists()
    if is_environment or (conf.is_dir() and not (conf / parent).is_dir()):
        fact = "is an environment" if is_environment else f"is no folder of {conf}"
        raise click.ClickException(f"extends = {short(repr(parent), 80)} in globals.yml {fact}: name a parent, or base")
