"""Settings without weights, and the tiny models of the metrics."""

import pytest
from tests.metrics.conftest import (  # noqa: F401
    clip_hf,
    dino_v2,
    dino_v3,
    open_clip_folder,
    passes,
    photos,
    vision_language,
)

from dpdmd_pipeline.scoring.preset import Settings


@pytest.fixture
def settings(tmp_path, passes) -> Settings:  # noqa: F811
    """One process, and an empty folder of weights."""
    return Settings(tmp_path / "weights", passes, processes=1, seed=0)
