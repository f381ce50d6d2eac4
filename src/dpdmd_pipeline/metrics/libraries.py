"""Versions of the libraries that compute metrics."""

from importlib.metadata import PackageNotFoundError, version

LIBRARIES = ("open_clip_torch", "pillow", "timm", "torch", "torchmetrics", "torchvision", "transformers")


def versions() -> dict[str, str]:
    """Version of each library; empty if it is not installed, since some are extras."""
    return {name: _version(name) for name in LIBRARIES}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
