"""Planning is tested against real trainings: the fixtures of tests/training."""

from tests.training.conftest import ask_teacher, backbone, embeddings, start

__all__ = ["ask_teacher", "backbone", "embeddings", "start"]
