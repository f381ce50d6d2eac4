"""Pipeline folders with real models' configurations and random weights, for machines without the real weights.

The configurations are the published ones. The tokenizers are not: every text is padded to the same length, so the work
does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

# stabilityai/stable-diffusion-3.5-medium
_SD35_MEDIUM: dict[str, dict[str, Any]] = {
    "transformer": {
        "sample_size": 128,
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 24,
        "num_attention_heads": 24,
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "vae": {
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "sample_size": 1024,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "scheduler": {"shift": 3.0},
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "hidden_act": "quick_gelu",
        "vocab_size": 49408,
    },
    "text_encoder_2": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "projection_dim": 1280,
        "hidden_act": "gelu",
        "vocab_size": 49408,
    },
    "text_encoder_3": {
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_layers": 24,
        "num_heads": 64,
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
    },
}
CONFIGS = {"sd35_medium": _SD35_MEDIUM}
CLIP_LENGTH = 77  # tokens per prompt of both CLIP encoders


def make_random_teacher(folder: Path, config: dict[str, dict[str, Any]], dtype: torch.dtype) -> Path:
    """Write a StableDiffusion3Pipeline with random weights; returns its folder.

    Args:
        folder: for the pipeline; SD3.5-Medium takes 16 GB in bfloat16, most of it the T5.
        config: arguments of each part, as in `CONFIGS`.
        dtype: of the weights.
    """
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models import AutoencoderKL, SD3Transformer2DModel
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # never hold all weights in float32
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            StableDiffusion3Pipeline(
                transformer=SD3Transformer2DModel(**config["transformer"]),
                vae=AutoencoderKL(**config["vae"]).float(),
                scheduler=FlowMatchEulerDiscreteScheduler(**config["scheduler"]),
                **_text_encoders(config),
                **_tokenizers(),
            ).save_pretrained(folder)
    finally:
        torch.set_default_dtype(default)
    return folder


def make_weightless_teacher(folder: Path, config: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Write only the configurations of such a pipeline; returns each part's number of parameters.

    Args:
        folder: for the configurations; they are small, and enough to estimate training's memory.
        config: arguments of each part, as in `CONFIGS`.
    """
    from diffusers import StableDiffusion3Pipeline
    from diffusers.models import AutoencoderKL, SD3Transformer2DModel
    from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

    with torch.device("meta"):
        networks = {
            "transformer": SD3Transformer2DModel(**config["transformer"]),
            "vae": AutoencoderKL(**config["vae"]),
            **_text_encoders(config),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(**config["scheduler"])
    pipeline = StableDiffusion3Pipeline(**networks, **_tokenizers(), scheduler=scheduler)
    pipeline.save_config(folder)
    for name, part in {**networks, "scheduler": scheduler}.items():
        save = part.config.save_pretrained if hasattr(part.config, "save_pretrained") else part.save_config
        save(folder / name)
    for name, tokenizer in _tokenizers().items():
        tokenizer.save_pretrained(folder / name)
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in networks.items()}


def _text_encoders(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer = _tokenizers()["tokenizer"]
    ends = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    clip = {
        name: CLIPTextModelWithProjection(CLIPTextConfig(**config[name], **ends, max_position_embeddings=CLIP_LENGTH))
        for name in ("text_encoder", "text_encoder_2")
    }
    return {**clip, "text_encoder_3": T5EncoderModel(T5Config(**config["text_encoder_3"]))}


def _tokenizers() -> dict[str, Any]:
    from transformers import T5TokenizerFast

    from dpdmd_pipeline.shapes.models import make_tokenizer

    tokenizer = make_tokenizer(CLIP_LENGTH)
    letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
    tokenizer_3 = T5TokenizerFast(vocab=pieces, extra_ids=0)
    return {"tokenizer": tokenizer, "tokenizer_2": tokenizer, "tokenizer_3": tokenizer_3}
