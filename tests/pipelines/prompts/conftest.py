"""Fixtures of the prompts stage."""

from tests.backbones.conftest import tiny_sana  # noqa: F401
