"""The configurations have the sizes of the real models."""

import pytest
import torch
from benchmarks.random_teacher import CONFIGS, make_random_teacher, make_weightless_teacher
from safetensors.torch import load_file
from tests.training.conftest import execution_with, recipe_with

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.memory import memory_model

# Parameters of the published weights
SIZES = {
    "sd35_medium": {
        "vae": 83_819_683,
        "text_encoder": 123_650_304,
        "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("config", SIZES)
def test_each_part_has_the_parameters_of_the_published_weights(config, tmp_path):
    assert make_weightless_teacher(tmp_path, CONFIGS[config]).items() >= SIZES[config].items()


def test_the_transformer_has_the_bytes_of_the_published_file():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**CONFIGS["sd35_medium"]["transformer"])
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 2 * count == pytest.approx(4.94e9, rel=1e-3)


def test_a_small_random_teacher_encodes_denoises_and_decodes(tmp_path):
    folder = make_random_teacher(tmp_path / "teacher", CONFIGS["sd35_medium_tiny"], torch.bfloat16)
    family = load_backbone(
        "sd3", folder, resolution=64, max_sequence_length=16, level_range=(0.02, 0.98), dtype=torch.bfloat16
    )
    cond, levels = family.encode(["a red circle"]), family.schedule(4)
    assert cond["prompt_embeds"].shape == (1, 77 + 16, 64) and family.shift == 3.0
    denoised = family.denoise(family.load_model(), torch.randn(1, *family.latent_shape), levels[0], cond)
    assert family.decode(denoised).shape == (1, 3, 64, 64)


def test_configurations_alone_give_the_same_estimate_as_weights(tmp_path):
    backbone = BackboneOptions(
        family="sd3",
        resolution=64,
        max_sequence_length=16,
        num_steps=8,
        guidance_scale=3.5,
        level_range=(0.02, 0.98),
        dtype="bfloat16",
        teacher_dtype=None,
    )
    options = recipe_with(precision="bfloat16"), execution_with(gradient_checkpointing=True)
    counts = make_weightless_teacher(tmp_path / "configs", CONFIGS["sd35_medium_tiny"])
    make_random_teacher(tmp_path / "weights", CONFIGS["sd35_medium_tiny"], torch.bfloat16)
    estimates = [memory_model(tmp_path / name, backbone).estimate(*options) for name in ("configs", "weights")]
    assert estimates[0] == estimates[1] and not list((tmp_path / "configs").rglob("*.safetensors"))
    weights = load_file(tmp_path / "weights/text_encoder_3/model.safetensors")
    assert counts["text_encoder_3"] == sum(tensor.numel() for tensor in weights.values())
