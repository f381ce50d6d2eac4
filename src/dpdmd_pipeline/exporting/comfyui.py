"""ComfyUI's spelling of a whole network, for a family whose diffusers keys it does not read."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FLUX2 = {  # module in diffusers: in ComfyUI, which has the names of the model's authors
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
_FLUX2_DOUBLE = {
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_add_out": "txt_attn.proj",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
    # three parts of one matrix, in this order
    **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v"), "img_attn.qkv"),
    **dict.fromkeys(("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "txt_attn.qkv"),
}
_FLUX2_SINGLE = {
    "attn.to_qkv_mlp_proj": "linear1",
    "attn.to_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_ORDER = [*_FLUX2, *_FLUX2_DOUBLE, *_FLUX2_SINGLE]


def comfyui_weights(family: str, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename a network's weights to keys that ComfyUI reads; most families keep diffusers' own."""
    return _flux2_from_diffusers(weights) if family == "flux2_klein" else weights


def _flux2_from_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts: dict[str, list[Tensor]] = {}
    by_order = sorted(weights, key=lambda name: _ORDER.index(_split(name)[2]))
    for name in by_order:
        single, block, module = _split(name)
        names, prefix = (_FLUX2, "") if block is None else (_FLUX2_DOUBLE, f"double_blocks.{block}.")
        if single:
            names, prefix = _FLUX2_SINGLE, f"single_blocks.{block}."
        key, value = prefix + names[module], weights[name]
        if module == "norm_out.linear":  # diffusers has the scale before the shift
            value = torch.cat(value.chunk(2)[::-1])
        parts.setdefault(f"{key}.scale" if key.endswith("_norm") else f"{key}.weight", []).append(value)
    return {key: torch.cat(values) if len(values) > 1 else values[0] for key, values in parts.items()}


def _split(name: str) -> tuple[str | None, str | None, str]:
    return re.fullmatch(r"(?:(single_)?transformer_blocks\.(\d+)\.)?(.+)\.weight", name).groups()
