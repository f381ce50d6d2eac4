"""Fixtures that many tests share."""

import pytest


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """An untrained StableDiffusion3Pipeline directory of the embedded world's sizes; treat it as read-only."""
    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(folder)
    return folder
