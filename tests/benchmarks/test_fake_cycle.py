"""The estimate against a cycle of the real loop on fake tensors; here with one block of the real width."""

from copy import deepcopy

import pytest
from benchmarks.fake_cycle import peak_of_cycles, walk_on_cuda
from benchmarks.random_teacher import CONFIGS, make_weightless_teacher
from tests.pipelines.train.test_small_cards import CONF

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.planning.memory import RESERVED, memory_model
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import TrainOptions

# Two micro-batches: the second one's gradient is added to the first one's
SHORT = {"batch_size": 2, "fake_score_turns": 1, "student_micro_batch": 1, "fake_score_micro_batch": 1}
SHORT |= {"rollout_micro_batch": 1, "num_steps": 3, "watch": {"every": 0}, "device": "cpu"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    config = deepcopy(CONFIGS["sd35_medium"])
    config["transformer"] |= {"num_layers": 1, "dual_attention_layers": (0,)}
    folder = tmp_path_factory.mktemp("few_blocks")
    make_weightless_teacher(folder, config)
    return folder


@pytest.mark.parametrize("roles", ["full", "lora"])
def test_a_cycle_stays_on_one_device_and_takes_at_most_what_was_estimated(teacher, roles):
    changes = {"train": {**SHORT, "roles": roles}}
    parameters = ConfigLoader(str(CONF), env="sd35", runtime_params=changes, **CONFIG_LOADER_ARGS)["parameters"]
    backbone, options = BackboneOptions(**parameters["backbone"]), TrainOptions(**parameters["train"])
    estimate = memory_model(teacher, backbone).estimate(options.recipe(), options.execution()).total - RESERVED
    peak = peak_of_cycles(teacher, backbone, options, anchor_steps=[1])
    assert peak <= estimate <= 1.15 * peak
    walk_on_cuda(teacher, backbone, options, anchor_steps=[1])
