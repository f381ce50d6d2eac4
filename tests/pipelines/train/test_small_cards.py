"""Every card takes the micro-batches that fit on it: estimated at full size, from the real models' configurations."""

from pathlib import Path

import pytest
from benchmarks.random_teacher import CONFIGS, make_weightless_teacher

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.planning.checks import refusals
from dpdmd_pipeline.planning.gpu import planned_memory, with_micro_batches
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import MICRO_BATCHES, TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

pytestmark = pytest.mark.full_size

CONF = Path(__file__).parents[3] / "conf"
CONFIG = {"sd35": "sd35_medium", "sdxl": "sdxl"}  # family -> its real configuration
CARDS = {12: 11.7, 16: 15.6, 24: 23.6, 48: 47.0, 80: 79.0}  # GB by name -> GiB that are free
LEAST = {("sd35", "lora"): 12, ("sdxl", "lora"): 16, ("sd35", "full"): 80, ("sdxl", "full"): 1000}  # GB that are enough
EIGHT = {"processes": 8, "machines": 1, "rendezvous": None, "sharding": "none"}


def plan(teacher: Path, environment: str, **changes) -> Plan:
    config = ConfigLoader(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["parameters"]
    # the card is given: neither a missing GPU nor this machine's memory refuses the run
    here = {"device": "cpu", "checkpoint_background": False}
    trained = {"train": TrainOptions(**config["train"] | here | changes)}
    anchors = {name: config["anchors"][name] for name in AnchorRecipe.model_fields}
    return Plan(teacher, BackboneOptions(**config["backbone"]), AnchorRecipe(**anchors), trained)


@pytest.mark.parametrize("family", CONFIG)
def test_every_card_gets_the_largest_micro_batches_that_fit_or_a_remedy(family, tmp_path):
    make_weightless_teacher(tmp_path, CONFIGS[CONFIG[family]])
    first = plan(tmp_path, family)
    sizes = {}
    for roles in ("lora", "full"):
        for card in CARDS:
            planned = plan(tmp_path, family, roles=roles, card_gib=CARDS[card])
            vars(planned)["estimates"] = first.estimates  # counted once
            lines = refusals(planned)
            assert (lines == []) == (card >= LEAST[family, roles])
            assert all("train.roles=lora" in line or roles == "lora" for line in lines)
            sizes[roles, card] = chosen(planned)
            print_row(planned, f"{family} | {roles} | {CARDS[card]} | {sizes[roles, card]}")
        one = plan(tmp_path, family, roles=roles, **dict.fromkeys(MICRO_BATCHES, 1))
        vars(one)["estimates"] = first.estimates
        print_row(one, f"{family} | {roles} | any | one picture at a time")
    assert sizes["lora", 12] < sizes["lora", 24] < sizes["lora", 80]  # more memory, larger micro-batches
    eight = plan(tmp_path, family, launch=EIGHT | {"sharding": "fsdp2"}, card_gib=CARDS[80])
    vars(eight)["estimates"] = first.estimates
    assert refusals(eight) == [] and chosen(eight) == [4, 4, 4]  # each process's share of the batch
    small = plan(tmp_path, f"{family}_lora_16gb")
    vars(small)["estimates"] = first.estimates
    assert refusals(small, 16 * 10**9) == []


def chosen(planned: Plan) -> list[int]:
    options = planned.trained["train"]
    options = with_micro_batches(planned.estimates, options, planned_memory(options))
    return [getattr(options, name) for name in MICRO_BATCHES]


def print_row(planned: Plan, name: str) -> None:
    """Print a row of docs/teachers.md; `pytest -s` shows it."""
    options = planned.trained["train"]
    options = with_micro_batches(planned.estimates, options, planned_memory(options))
    memory = planned.estimates.estimate(options.recipe(), options.execution())
    print(f"| {name} | {memory} |", flush=True)
