"""The tiny teachers of the families' tests."""

from tests.backbones.conftest import edited, tiny_sdxl  # noqa: F401
