"""Fixtures of the sharded caches."""

from pathlib import Path

import pytest
from tests.datasets.sharded.caches import contents, lazy_shards

from dpdmd_pipeline.datasets.sharded import ShardedDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "anchors"


@pytest.fixture
def dataset(folder: Path) -> ShardedDataset:
    return ShardedDataset(filepath=str(folder))


@pytest.fixture(scope="session")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The files of a cache that was written without interruption."""
    folder = tmp_path_factory.mktemp("whole") / "anchors"
    ShardedDataset(filepath=str(folder)).save(lazy_shards())
    return contents(folder)
