"""The environments of small cards fit on them: estimated at full size, from the real models' configurations alone."""

from pathlib import Path

import pytest
from benchmarks.random_teacher import CONFIGS, make_weightless_teacher
from kedro.config import OmegaConfigLoader

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.checks import refusals
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

CONF = Path(__file__).parents[3] / "conf"
CARD = 16 * 10**9  # bytes
CONFIG = {"sd35": "sd35_medium", "sdxl": "sdxl"}  # family -> its real configuration


def plan(teacher: Path, environment: str) -> Plan:
    config = OmegaConfigLoader(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["parameters"]
    # where there is no GPU, the options of one are not refused for that: the card is given
    trained = {"train": TrainOptions(**config["train"] | {"device": "cpu", "fused": False})}
    anchors = {name: config["anchors"][name] for name in AnchorRecipe.model_fields}
    return Plan(teacher, BackboneOptions(**config["backbone"]), AnchorRecipe(**anchors), trained)


@pytest.mark.parametrize("family", CONFIG)
def test_adapters_one_picture_at_a_time_fit_on_a_card_of_16_gb(family, tmp_path):
    make_weightless_teacher(tmp_path, CONFIGS[CONFIG[family]])
    assert refusals(plan(tmp_path, f"{family}_lora_16gb"), CARD) == []
