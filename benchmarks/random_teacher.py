"""Pipeline folders with real models' configurations and random weights, for machines without the real weights.

The configurations are the published ones. A weight of n inputs has the deviation n^-1/2, biases are 0 and norms 1, so
that activations keep their size and stay finite. All weights are cut from one block of 16 million normal numbers, each
at its own place: fresh numbers for 8 billion weights would take minutes. The tokenizers have the size of the published
vocabularies, but spell every text in letters: texts are padded to the same length, so the work does not depend on them.

    python benchmarks/random_teacher.py sdxl /big/disk/sdxl
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import torch

_CLIP_L: dict[str, Any] = {  # openai/clip-vit-large-patch14
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "vocab_size": 49408,
}
_CLIP_BIG_G: dict[str, Any] = {  # laion/CLIP-ViT-bigG-14-laion2B-39B-b160k
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
    "vocab_size": 49408,
}
_T5_XXL: dict[str, Any] = {  # google/t5-v1_1-xxl
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "vocab_size": 32128,
}
_AUTOENCODER: dict[str, Any] = {  # the sizes that Stable Diffusion's autoencoders have in common
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "sample_size": 1024,
}
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
        **_AUTOENCODER,
        "latent_channels": 16,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "scheduler": {"shift": 3.0},
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
    "text_encoder_3": _T5_XXL,
}
# stabilityai/stable-diffusion-xl-base-1.0
_SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "sample_size": 128,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [320, 640, 1280],
        "layers_per_block": 2,
        "transformer_layers_per_block": [1, 2, 10],
        "attention_head_dim": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**_AUTOENCODER, "scaling_factor": 0.13025},
    "scheduler": {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    },
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
}
# Sizes of the same classes for dry runs and tests
_TINY_CLIP = {"hidden_size": 32, "intermediate_size": 32, "projection_dim": 32, "num_hidden_layers": 2}
_TINY_CLIP |= {"num_attention_heads": 2, "vocab_size": 1024}
_TINY: dict[str, dict[str, Any]] = {
    "transformer": {
        "num_layers": 2,
        "num_attention_heads": 2,
        "caption_projection_dim": 128,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "dual_attention_layers": (0,),
        "pos_embed_max_size": 32,
    },
    "unet": {
        "block_out_channels": [32, 64, 64],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 1, 1],
        "attention_head_dim": [1, 2, 2],
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
    "vae": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1},
    "scheduler": {},
    "text_encoder": _TINY_CLIP,
    "text_encoder_2": _TINY_CLIP,
    "text_encoder_3": {"d_model": 64, "d_ff": 64, "num_layers": 1, "num_heads": 2, "d_kv": 8, "vocab_size": 64},
}
_REAL = {"sd35_medium": _SD35_MEDIUM, "sdxl": _SDXL}
CONFIGS = _REAL | {
    f"{name}_tiny": {part: {**values, **_TINY[part]} for part, values in config.items()}
    for name, config in _REAL.items()
}
CLIP_LENGTH = 77  # tokens per prompt of both CLIP encoders
_SHARD = "2GB"  # of a part's weights: the largest parts have several files, as on the hub


def make_random_teacher(folder: Path, config: dict[str, dict[str, Any]], dtype: torch.dtype) -> Path:
    """Write a diffusers pipeline with random weights; returns its folder. One part is in memory at a time.

    Args:
        folder: for the pipeline; SD3.5-Medium takes 16 GB in bfloat16, most of it the T5, and SDXL 7 GB.
        config: arguments of each part, as in `CONFIGS`.
        dtype: of the weights.
    """
    from accelerate import init_empty_weights

    make_weightless_teacher(folder, config)
    numbers = torch.randn(2**24, generator=torch.Generator().manual_seed(0)).to(dtype)
    for name in _network_names(config):
        with init_empty_weights(include_buffers=False):
            network = _make_network(name, config)
        _fill(network, numbers)
        network.save_pretrained(folder / name, max_shard_size=_SHARD)
    return folder


def make_weightless_teacher(folder: Path, config: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Write only the configurations of such a pipeline; returns each part's number of parameters.

    Args:
        folder: for the configurations; they are small, and enough to estimate training's memory.
        config: arguments of each part, as in `CONFIGS`.
    """
    import diffusers

    with torch.device("meta"):
        networks = {name: _make_network(name, config) for name in _network_names(config)}
    kind = diffusers.EulerDiscreteScheduler if "unet" in config else diffusers.FlowMatchEulerDiscreteScheduler
    scheduler, tokenizers = kind(**config["scheduler"]), _tokenizers(config)
    _pipeline_class(config)(**networks, **tokenizers, scheduler=scheduler).save_config(folder)
    for name, part in {**networks, "scheduler": scheduler}.items():
        save = part.config.save_pretrained if hasattr(part.config, "save_pretrained") else part.save_config
        save(folder / name)
    for name, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / name)
    return {name: sum(weight.numel() for weight in part.parameters()) for name, part in networks.items()}


def _fill(network: torch.nn.Module, numbers: torch.Tensor) -> None:
    """Give all weights values and a dtype: those of `numbers`, scaled by the root of their inputs; see the module."""
    place = 0
    for module in network.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.ndim < 2:
                values = torch.full(weight.shape, float(name != "bias"), dtype=numbers.dtype)
            else:
                place, size = (place + 1_000_003) % len(numbers), weight.numel()
                times = -(-(place + size) // len(numbers))
                repeated = numbers.repeat(times) if times > 1 else numbers
                values = (repeated[place : place + size] * weight[0].numel() ** -0.5).view(weight.shape)
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
    if hasattr(network, "tie_weights"):
        network.tie_weights()


def _pipeline_class(config: dict[str, dict[str, Any]]) -> Any:
    import diffusers

    return diffusers.StableDiffusionXLPipeline if "unet" in config else diffusers.StableDiffusion3Pipeline


def _network_names(config: dict[str, dict[str, Any]]) -> list[str]:
    return [name for name in config if name != "scheduler"]


def _make_network(name: str, config: dict[str, dict[str, Any]]) -> Any:
    """A network of the class that the pipeline names, on the device that torch is set to."""
    import transformers

    (kind,) = _pipeline_class(config)._get_signature_types()[name]
    values = copy.deepcopy(config[name])
    if not name.startswith("text_encoder"):
        return kind(**values)
    if kind is transformers.T5EncoderModel:
        return kind(transformers.T5Config(**values))
    size = values["vocab_size"]  # start and end are the last two tokens, as in CLIP
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    return kind(transformers.CLIPTextConfig(**values, **ends, max_position_embeddings=CLIP_LENGTH))


def _tokenizers(config: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A tokenizer of letters for each text encoder, filled up to the size of its vocabulary."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer, T5TokenizerFast

    tokenizers = {}
    for name in (name for name in config if name.startswith("text_encoder")):
        size = config[name]["vocab_size"]
        if "d_model" in config[name]:
            letters = [("▁", -2.0), *((letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz")]
            pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *letters]
            pieces += [(f"<unused{number}>", -99.0) for number in range(size - len(pieces))]
            tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0)
        else:
            letters = [letter + end for end in ("", "</w>") for letter in sorted(ByteLevel.alphabet())]
            unused = [f"<unused{number}>" for number in range(size - len(letters) - 2)]
            tokens = [*letters, *unused, "<|startoftext|>", "<|endoftext|>"]
            vocab = {token: number for number, token in enumerate(tokens)}
            tokenizer = CLIPTokenizer(vocab=vocab, merges=[], model_max_length=CLIP_LENGTH)
        tokenizers[name.replace("text_encoder", "tokenizer")] = tokenizer
    return tokenizers


if __name__ == "__main__":
    config_name, target = sys.argv[1], Path(sys.argv[2])
    if not (target / "complete").is_file():
        make_random_teacher(target, CONFIGS[config_name], torch.bfloat16)
        (target / "complete").touch()
