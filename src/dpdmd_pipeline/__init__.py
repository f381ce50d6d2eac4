"""DP-DMD: distil a text-to-image model into four steps and keep a different picture for every seed."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`dpdmd_pipeline.sample`, loaded on use: importing the package must not load torch."""
    if name == "sample":
        # by name, so that what reads the version does not depend on the sampler's code
        from importlib import import_module

        return import_module("dpdmd_pipeline.exporting.sample").sample
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
