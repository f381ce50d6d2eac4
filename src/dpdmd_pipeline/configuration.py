"""Kedro's configuration loader, for which the DMD baseline follows `train` on the command line as in the files."""

from __future__ import annotations

from typing import Any

from kedro.config import OmegaConfigLoader

BASELINE_KEYS = ("anchored_steps", "diversity_weight", "stop_gradient")  # the differences between DP-DMD and DMD


class ConfigLoader(OmegaConfigLoader):
    """OmegaConfigLoader whose runtime parameters of `train` also reach `train_dmd`, except for its own three keys."""

    def __init__(self, *args: Any, runtime_params: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, runtime_params=with_baseline(runtime_params or {}), **kwargs)


def with_baseline(parameters: dict[str, Any]) -> dict[str, Any]:
    """Copy runtime parameters of `train` to `train_dmd`; what is given for `train_dmd` itself wins."""
    train, baseline = parameters.get("train"), parameters.get("train_dmd", {})
    if not isinstance(train, dict) or not isinstance(baseline, dict):
        return parameters
    shared = {key: value for key, value in train.items() if key not in BASELINE_KEYS}
    return {**parameters, "train_dmd": _merged(shared, baseline)} if shared else parameters


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merged(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **both}
