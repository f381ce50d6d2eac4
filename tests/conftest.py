"""Fixtures that many tests share."""

import pytest

# Two workers take module after module: what takes minutes comes first, so that neither waits for the other at the end.
LONGEST = ("test_demo.py", "test_launch.py", "test_distill.py", "test_resume.py", "test_environments.py")


def pytest_collection_modifyitems(items):
    """The longest modules first; else the order stays."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory):
    """An untrained StableDiffusion3Pipeline directory of the embedded world's sizes; treat it as read-only."""
    from dpdmd_pipeline.shapes.models import make_pipeline

    folder = tmp_path_factory.mktemp("tiny") / "teacher"
    make_pipeline(max_length=12, shift=1.0, seed=0).save_pretrained(folder)
    return folder
