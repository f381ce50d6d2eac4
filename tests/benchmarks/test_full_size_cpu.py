"""Parts of the run at full size: its environments, and products in half precision."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dpdmd_pipeline.configuration import ConfigLoader

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))  # its scripts import each other by name

from benchmarks import full_size_cpu as run  # noqa: E402
from dpdmd_pipeline.backbones.options import BackboneOptions  # noqa: E402
from dpdmd_pipeline.pipelines.evaluate.options import EvaluateOptions  # noqa: E402
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS  # noqa: E402
from dpdmd_pipeline.training.options import TrainOptions  # noqa: E402
from dpdmd_pipeline.training.recipe import AnchorRecipe  # noqa: E402


@pytest.mark.parametrize("family", run.BASIS)
def test_the_environment_is_one_cycle_of_adapters_in_bfloat16_on_the_cpu(family, tmp_path):
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "data/01_raw").mkdir(parents=True)
    run.write_environment(tmp_path, run.BASIS[family][1], tmp_path / "teacher")
    loaded = ConfigLoader(str(tmp_path / "conf"), env=run.ENVIRONMENT, **CONFIG_LOADER_ARGS)["parameters"]
    students = [TrainOptions(**loaded[group]) for group in ("train", "train_dmd")]
    backbone = BackboneOptions(**loaded["backbone"])
    assert [(s.roles, s.max_steps, s.batch_size, s.device, s.watch.every) for s in students] == 2 * [
        ("lora", 1, 1, "cpu", 0)
    ]
    assert (backbone.family, backbone.resolution, backbone.dtype) == (family, 256, "bfloat16")
    assert AnchorRecipe(**loaded["anchors"]).anchor_levels[0].steps < backbone.num_steps
    assert EvaluateOptions(**loaded["evaluate"]).images_per_prompt == 2


PRODUCTS = {
    "linear": lambda x: F.linear(x, x),
    "matmul": lambda x: x @ x,
    "batched": lambda x: x.expand(2, 8, 8) @ x.expand(2, 8, 8),
    "convolution": lambda x: F.conv2d(x.view(1, 4, 4, 4), x.view(4, 4, 2, 2)),
    "attention": lambda x: F.scaled_dot_product_attention(*3 * [x.view(1, 1, 8, 8)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_in_half_precision_are_rounded_float32_ones(name):
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with run.Float32Products():
        half = x.clone().requires_grad_()
        result = PRODUCTS[name](half)
        result.float().sum().backward()
    exact = PRODUCTS[name](x.float())
    assert result.dtype == half.grad.dtype == torch.bfloat16
    assert torch.equal(result, exact.bfloat16())


def test_a_line_of_the_log_file_has_its_time_and_owner():
    one, other = (
        run.Line.parse(f"2026-12-01 10:58:07,610 19550 {level} {name}: DMD: 17 forwards")
        for level, name in (("INFO", "dpdmd_pipeline.planning.gpu"), ("DEBUG", "kedro.runner"))
    )
    assert one.is_own and not other.is_own
    assert one.text == "DMD: 17 forwards" and one.time % 60 == pytest.approx(7.61)
