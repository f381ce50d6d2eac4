"""The tiny diffusers components of the embedded teachers: the real classes, small.

There are two pipelines: SD3 (flow matching) and SDXL (diffusion). The SD3 transformer has in_channels 16, head size 64
and as many layers as heads, because ComfyUI recognises an SD3 network by these sizes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dpdmd_pipeline.shapes.world import RESOLUTION, captions

LATENT_CHANNELS = 16
SDXL_LATENT_CHANNELS = 4
LATENT_SIZE = RESOLUTION // 4
_TEXT_WIDTH = 32  # each of the two text encoders
_NUM_HEADS = 3
_TIME_ID_WIDTH = 8  # each of SDXL's six numbers of size and crop


def make_tokenizer(max_length: int) -> CLIPTokenizer:
    """Make a byte-level BPE tokenizer in which every word of the world's captions is one token.

    It is a complete CLIP tokenizer: other words become bytes, and no byte is lost.
    """
    alphabet = sorted(ByteLevel.alphabet())
    vocabulary = alphabet + [letter + "</w>" for letter in alphabet]
    merges: list[tuple[str, str]] = []
    for word in sorted({word for text in captions() for word in text.split()}):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            pieces[:2] = ["".join(pair)]
            if pair not in merges:
                merges.append(pair)
                vocabulary.append(pieces[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # end last: CLIP pools at the highest id
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocabulary))},
        merges=merges,
        model_max_length=max_length,
    )


def make_text_encoder(tokenizer: CLIPTokenizer, kind: Any = CLIPTextModelWithProjection) -> Any:
    """Make a two-layer CLIP text model with random weights; by default with a projected pooled embedding."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config)


def make_vae() -> AutoencoderKL:
    """Make an SD3-style autoencoder, 32x32x3 to 8x8x16, with random weights."""
    return _make_autoencoder(
        LATENT_CHANNELS,
        shift_factor=0.0,  # set after training, from the trained latents
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_sdxl_vae() -> AutoencoderKL:
    """Make an SDXL-style autoencoder, 32x32x3 to 8x8x4, with random weights; its latents are scaled, not shifted."""
    return _make_autoencoder(SDXL_LATENT_CHANNELS)


def _make_autoencoder(latent_channels: int, **style: Any) -> AutoencoderKL:
    channels = (16, 32, 32)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        latent_channels=latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        **style,
    )


def make_transformer() -> SD3Transformer2DModel:
    """Make a three-layer SD3 transformer (3.8 M parameters) with random weights."""
    return SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        pos_embed_max_size=LATENT_SIZE,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=_NUM_HEADS,
        num_attention_heads=_NUM_HEADS,
        attention_head_dim=64,
        caption_projection_dim=64 * _NUM_HEADS,
        joint_attention_dim=2 * _TEXT_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        qk_norm="rms_norm",
    )


def make_unet() -> UNet2DConditionModel:
    """Make a two-level SDXL UNet (4 M parameters) with random weights; the first level has no attention, as in SDXL."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=SDXL_LATENT_CHANNELS,
        out_channels=SDXL_LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),  # diffusers' name for the number of heads
        use_linear_projection=True,
        cross_attention_dim=2 * _TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=_TIME_ID_WIDTH,
        projection_class_embeddings_input_dim=_TEXT_WIDTH + 6 * _TIME_ID_WIDTH,
        norm_num_groups=16,
    )


def make_diffusion_scheduler() -> DDIMScheduler:
    """DDIM on SDXL's noise levels, with trailing timesteps: they start at full noise, and the end is clean."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        timestep_spacing="trailing",
        clip_sample=False,
    )


def make_pipeline(*, max_length: int, shift: float, seed: int) -> StableDiffusion3Pipeline:
    """Make an untrained StableDiffusion3Pipeline of the tiny components, without a T5 encoder.

    Args:
        max_length: tokens per prompt, start and end included.
        shift: of the flow-matching schedule, static; 1 puts the steps at the levels that matter for small pictures.
        seed: of the initial weights.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(max_length)
        return StableDiffusion3Pipeline(
            transformer=make_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=make_vae(),
            text_encoder=make_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=make_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )


def make_sdxl_pipeline(*, max_length: int, seed: int) -> StableDiffusionXLPipeline:
    """Make an untrained SDXL pipeline, as `make_pipeline` does for SD3; its unconditional embeddings are zeros."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(max_length)
        return StableDiffusionXLPipeline(
            unet=make_unet(),
            scheduler=make_diffusion_scheduler(),
            vae=make_sdxl_vae(),
            text_encoder=make_text_encoder(tokenizer, CLIPTextModel),
            tokenizer=tokenizer,
            text_encoder_2=make_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )


def save_half(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline in half precision whose parts all load in float32, unless a dtype is given.

    diffusers loads its own networks so. It loads a text encoder in the precision of its config.
    """
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    for path in Path(folder).glob("text_encoder*/config.json"):
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"dtype": "float32"}, indent=2, sort_keys=True) + "\n"
        )
