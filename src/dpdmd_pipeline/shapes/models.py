"""The tiny diffusers components of the embedded teacher: the real classes, small.

The transformer keeps in_channels 16, head size 64 and as many layers as heads: the sizes from which
ComfyUI recognises an SD3 network. diffusers and transformers are imported on use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dpdmd_pipeline.shapes.world import RESOLUTION, captions

if TYPE_CHECKING:
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

LATENT_CHANNELS = 16
LATENT_SIZE = RESOLUTION // 4
_TEXT_WIDTH = 32  # each of the two text encoders
_NUM_HEADS = 3


def make_tokenizer(max_length: int) -> CLIPTokenizer:
    """A byte-level BPE tokenizer with a merge path for every word of the world's captions.

    It is a complete CLIP tokenizer: words it does not know fall apart into bytes, never into nothing.
    """
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

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
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]  # end last: CLIP pools where the id is highest
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(dict.fromkeys(vocabulary))},
        merges=merges,
        model_max_length=max_length,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A two-layer CLIP text model with random weights."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

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
    return CLIPTextModelWithProjection(config)


def make_vae() -> AutoencoderKL:
    """An SD3-style autoencoder, 32x32x3 to 8x8x16, with random weights."""
    from diffusers import AutoencoderKL

    channels = (16, 32, 32)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * len(channels),
        up_block_types=["UpDecoderBlock2D"] * len(channels),
        block_out_channels=channels,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=RESOLUTION,
        shift_factor=0.0,  # until the trained latents are measured
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def make_transformer() -> SD3Transformer2DModel:
    """A three-layer SD3 transformer (3.8 M parameters) with random weights."""
    from diffusers import SD3Transformer2DModel

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


def make_scheduler(shift: float) -> FlowMatchEulerDiscreteScheduler:
    """diffusers' flow-matching sampler with a static shift."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=shift)


def make_pipeline(*, max_length: int, shift: float, seed: int) -> StableDiffusion3Pipeline:
    """An untrained StableDiffusion3Pipeline of the tiny parts, without a T5 encoder.

    Args:
        max_length: tokens per prompt, start and end included.
        shift: of the flow-matching schedule; 1 spends the steps where small pictures decide.
        seed: of the initial weights.
    """
    from diffusers import StableDiffusion3Pipeline

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(max_length)
        return StableDiffusion3Pipeline(
            transformer=make_transformer(),
            scheduler=make_scheduler(shift),
            vae=make_vae(),
            text_encoder=make_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=make_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
