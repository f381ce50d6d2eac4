"""The libraries that metrics are computed with."""

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("open_clip_torch", "pillow", "timm", "torch", "torchmetrics", "torchvision", "transformers")


def versions() -> dict[str, str]:
    """Of each; empty where it is not installed, since some are extras."""
    return {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
