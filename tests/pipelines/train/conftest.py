"""The tiny teachers of the families' tests."""

from tests.backbones.conftest import edited, tiny_flux2_klein, tiny_qwen_image, tiny_sdxl, tiny_z_image  # noqa: F401
