"""The environments of small cards fit on them, at full size: estimated from the real models' configurations alone."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks.random_teacher import CONFIGS, make_weightless_teacher
from kedro.config import OmegaConfigLoader
from tests.backbones.conftest import make_qwen_tokenizer

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.datasets.pretrained import INDEX
from dpdmd_pipeline.planning.checks import refusals
from dpdmd_pipeline.planning.plan import Plan
from dpdmd_pipeline.planning.teacher import faulty_parts
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

CONF = Path(__file__).parents[3] / "conf"
GB = 10**9
VAE = {  # of SD3's sizes, without scale and shift
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
}


@pytest.fixture(scope="module")
def sd35(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd35")
    make_weightless_teacher(folder, CONFIGS["sd35_medium"])
    return folder


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    make_weightless_teacher(folder, CONFIGS["sdxl"])
    return folder


@pytest.fixture(scope="module")
def z_image(tmp_path_factory) -> Path:
    """Tongyi-MAI/Z-Image: diffusers' defaults are its configuration; the tokenizer alone is a small one."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config

    folder, tokenizer = tmp_path_factory.mktemp("z_image"), make_qwen_tokenizer()
    with torch.device("meta"):
        networks = {
            "transformer": ZImageTransformer2DModel(),
            "vae": AutoencoderKL(**VAE | {"latent_channels": 16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        }
    assert sum(weight.numel() for weight in networks["transformer"].parameters()) == 6_154_908_736  # 12.3 GB, published
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    ZImagePipeline(**networks, scheduler=scheduler, text_encoder=None, tokenizer=tokenizer).save_config(folder)
    for name, part in {**networks, "scheduler": scheduler}.items():
        part.save_config(folder / name)
    sizes = {"hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
    Qwen3Config(vocab_size=len(tokenizer), **sizes).save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"text_encoder": ["transformers", "Qwen3Model"]}))
    return folder


def plan(teacher: Path, environment: str) -> Plan:
    config = OmegaConfigLoader(str(CONF), env=environment, **CONFIG_LOADER_ARGS)["parameters"]
    # where there is no GPU, the options of one are not refused for that: the card is given
    trained = {"train": TrainOptions(**config["train"] | {"device": "cpu", "fused": False})}
    anchors = {name: config["anchors"][name] for name in AnchorRecipe.model_fields}
    return Plan(teacher, BackboneOptions(**config["backbone"]), AnchorRecipe(**anchors), trained)


@pytest.mark.parametrize(
    "teacher, environment, card",
    [("sd35", "sd35_lora_16gb", 16 * GB), ("sdxl", "sdxl_lora_16gb", 16 * GB), ("z_image", "z_image", 24 * GB)],
)
def test_adapters_one_picture_at_a_time_fit_on_a_small_card(request, teacher, environment, card):
    assert refusals(plan(request.getfixturevalue(teacher), environment), card) == []


def test_a_teacher_of_today_is_checked_at_full_size_before_its_weights_are_there(z_image):
    assert [*faulty_parts(z_image, plan(z_image, "z_image").backbone, is_complete=False)] == []
