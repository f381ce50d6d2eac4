"""Text and pictures of the small pipeline that `make distill` exports; ComfyUI's own loaders refuse its sizes.

Nothing of it is needed for real models. torch, safetensors, and inside functions what every ComfyUI installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

_INDEX = "model_index.json"
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def list_pipelines(roots: list[str]) -> list[str]:
    """Names of all folders with a pipeline, relative to their root."""
    names = {path.parent.relative_to(root).as_posix() for root in roots for path in Path(root).rglob(_INDEX)}
    return sorted(names - {"."})


def find_pipeline(name: str, roots: list[str]) -> Path:
    """The folder of a pipeline that this module can read.

    Raises:
        ValueError: if there is none of that name, or it is not an SD3 pipeline without a T5 encoder.
    """
    if name not in list_pipelines(roots):
        raise ValueError(
            f"pipeline {name!r} is not in models/diffusers: copy the export's folder `diffusers` there, refresh, and "
            "choose it"
        )
    folder = next(Path(root) / name for root in roots if (Path(root) / name / _INDEX).is_file())
    index = _json(folder / _INDEX)
    kind, has_t5 = index.get("_class_name"), (folder / "text_encoder_3").is_dir()
    if kind != "StableDiffusion3Pipeline" or has_t5:
        raise ValueError(
            f"pipeline {name!r} is a {kind}{' with T5' if has_t5 else ''}, the demonstration reads SD3 without T5: "
            "load its text encoders and VAE with ComfyUI's own loaders"
        )
    return folder


# ---- text


@torch.no_grad()
def encode_prompt(folder: Path, text: str) -> tuple[Tensor, Tensor]:
    """Embeddings as in training: [1, tokens, width] of both CLIPs side by side, and pooled [1, 2 * width].

    Positions of the T5 encoder, which the pipeline lacks, are zeros.
    """
    states, pooled = zip(*(_encode(folder, name, text) for name in _TEXT_ENCODERS), strict=True)
    tokens = torch.cat(states, dim=-1)
    return F.pad(tokens, (0, 0, 0, _t5_tokens(folder))), torch.cat(pooled, dim=-1)


def _encode(folder: Path, name: str, text: str) -> tuple[Tensor, Tensor]:
    from tokenizers import Tokenizer
    from transformers import CLIPTextModelWithProjection

    home = folder / name.replace("text_encoder", "tokenizer")
    config, tokenizer = _json(home / "tokenizer_config.json"), Tokenizer.from_file(str(home / "tokenizer.json"))
    length, pad = config["model_max_length"], config["pad_token"]
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    encoder = CLIPTextModelWithProjection.from_pretrained(folder / name, local_files_only=True).float().eval()
    output = encoder(torch.tensor([tokenizer.encode(text).ids]), output_hidden_states=True)
    return output.hidden_states[-2], output.text_embeds


def _t5_tokens(folder: Path) -> int:
    with safe_open(_only_weights(folder / "transformer"), framework="pt") as file:
        return int((file.metadata() or {}).get("dpdmd.max_sequence_length", 0))


# ---- pictures


@torch.no_grad()
def decode_latents(folder: Path, latents: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1] from the network's latents."""
    vae = _Decoder(folder / "vae")
    raw = latents.float() / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0.0)
    return (vae.decode(raw) / 2 + 0.5).clamp(0, 1)


class _Decoder:
    """The decoder of diffusers' AutoencoderKL, read from its file."""

    def __init__(self, folder: Path) -> None:
        self.config = _json(folder / "config.json")
        self.weights = {name: value.float() for name, value in load_file(_only_weights(folder)).items()}

    def decode(self, x: Tensor) -> Tensor:
        if "post_quant_conv.weight" in self.weights:
            x = self._conv(x, "post_quant_conv")
        x = self._conv(x, "decoder.conv_in")
        x = self._resnet(x, "decoder.mid_block.resnets.0")
        if self._has("decoder.mid_block.attentions.0."):
            x = self._attention(x, "decoder.mid_block.attentions.0")
        x = self._resnet(x, "decoder.mid_block.resnets.1")
        for block in range(len(self.config["block_out_channels"])):
            name = f"decoder.up_blocks.{block}"
            for layer in range(self.config["layers_per_block"] + 1):
                x = self._resnet(x, f"{name}.resnets.{layer}")
            if self._has(f"{name}.upsamplers.0."):
                x = self._conv(F.interpolate(x, scale_factor=2.0, mode="nearest"), f"{name}.upsamplers.0.conv")
        return self._conv(F.silu(self._norm(x, "decoder.conv_norm_out")), "decoder.conv_out")

    def _has(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.weights)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def _conv(self, x: Tensor, name: str) -> Tensor:
        return F.conv2d(x, *self._parameters(name), padding="same")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, self.config["norm_num_groups"], *self._parameters(name), eps=1e-6)

    def _resnet(self, x: Tensor, name: str) -> Tensor:
        hidden = x
        for layer in ("1", "2"):
            hidden = self._conv(F.silu(self._norm(hidden, f"{name}.norm{layer}")), f"{name}.conv{layer}")
        return hidden + (self._conv(x, f"{name}.conv_shortcut") if self._has(f"{name}.conv_shortcut.") else x)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        pixels = self._norm(x, f"{name}.group_norm").flatten(2).transpose(1, 2)  # [B, H * W, C], one head
        q, k, v = (F.linear(pixels, *self._parameters(f"{name}.to_{part}")) for part in "qkv")
        mixed = F.linear(F.scaled_dot_product_attention(q, k, v), *self._parameters(f"{name}.to_out.0"))
        return x + mixed.transpose(1, 2).reshape(x.shape)


def _only_weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
