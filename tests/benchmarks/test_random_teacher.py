"""The configurations have the sizes of the real models."""

import copy

import pytest
import torch
from benchmarks.random_teacher import CONFIGS, make_random_teacher, make_weightless_teacher
from safetensors.torch import load_file
from tests.training.conftest import execution_with, recipe_with

from dpdmd_pipeline.backbones.base import load_backbone
from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.planning.memory import memory_model

# Parameters of the published weights
SIZES = {"vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}


def parameters(name: str) -> int:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    config = CONFIGS["sd35_medium"][name]
    with torch.device("meta"):
        if name == "vae":
            model = AutoencoderKL(**config)
        elif name == "text_encoder_3":
            model = T5EncoderModel(T5Config(**config))
        else:
            model = CLIPTextModelWithProjection(CLIPTextConfig(**config))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_each_part_has_the_parameters_of_the_published_weights(name):
    assert parameters(name) == SIZES[name]


def test_the_transformer_has_the_bytes_of_the_published_file():
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**CONFIGS["sd35_medium"]["transformer"])
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    assert 2 * count == pytest.approx(4.94e9, rel=1e-3)


def small_config() -> dict:
    config = copy.deepcopy(CONFIGS["sd35_medium"])
    config["transformer"] |= {"num_layers": 2, "num_attention_heads": 2, "caption_projection_dim": 128}
    config["transformer"] |= {"joint_attention_dim": 64, "pooled_projection_dim": 64, "dual_attention_layers": (0,)}
    config["transformer"] |= {"pos_embed_max_size": 8}
    config["vae"] |= {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}
    for name in ("text_encoder", "text_encoder_2"):
        config[name] |= {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 2}
        config[name] |= {"num_attention_heads": 2, "vocab_size": 1024}
    config["text_encoder_3"] |= {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 8}
    config["text_encoder_3"] |= {"vocab_size": 64}
    return config


def test_a_small_random_teacher_encodes_denoises_and_decodes(tmp_path):
    folder = make_random_teacher(tmp_path / "teacher", small_config(), torch.bfloat16)
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
    )
    options = recipe_with(precision="bfloat16"), execution_with(gradient_checkpointing=True)
    counts = make_weightless_teacher(tmp_path / "configs", small_config())
    make_random_teacher(tmp_path / "weights", small_config(), torch.bfloat16)
    estimates = [memory_model(tmp_path / name, backbone).estimate(*options) for name in ("configs", "weights")]
    assert estimates[0] == estimates[1] and not list((tmp_path / "configs").rglob("*.safetensors"))
    weights = load_file(tmp_path / "weights/text_encoder_3/model.safetensors")
    assert counts["text_encoder_3"] == sum(tensor.numel() for tensor in weights.values())
