"""Pipelines as single files in the layout of the models' authors: the inverse of what diffusers reads."""

from __future__ import annotations

import torch
from safetensors.torch import save_file

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.final_layer_norm": "ln_final",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
SD3 = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
SD3_BLOCK = {
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.to_add_out": "context_block.attn.proj",
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def save_single_file(pipeline, file, *, without=(), **changes):
    """Write a tiny SDXL or SD3 pipeline; `without` these parts, and with these tensors replaced."""
    parts = {"vae": {f"first_stage_model.{name}": v for name, v in _vae(pipeline.vae).items()}}
    if hasattr(pipeline, "unet"):
        parts["network"] = _unet(pipeline.unet)
        clip = {
            f"text_model.{name.removeprefix('text_model.')}": v for name, v in _state(pipeline.text_encoder).items()
        }
        parts["text_encoder"] = {f"conditioner.embedders.0.transformer.{name}": v for name, v in clip.items()}
        second = _open_clip(_state(pipeline.text_encoder_2))
        parts["text_encoder_2"] = {f"conditioner.embedders.1.model.{name}": v for name, v in second.items()}
    else:
        parts["network"] = _sd3(pipeline.transformer)
        for name, prefix in {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}.items():
            state = _state(getattr(pipeline, name))
            parts[name] = {f"text_encoders.{prefix}.transformer.{key}": value for key, value in state.items()}
    parts["network"] = {f"model.diffusion_model.{name}": value for name, value in parts["network"].items()}
    tensors = {name: value for part, state in parts.items() if part not in without for name, value in state.items()}
    save_file({name: value.contiguous().clone() for name, value in (tensors | changes).items()}, file)
    return file


def _state(network):
    return {name: value for name, value in network.state_dict().items() if not name.endswith("position_ids")}


def _renamed(name, table):
    start = max((key for key in table if name.startswith(f"{key}.") or name == key), key=len, default=None)
    return None if start is None else table[start] + name.removeprefix(start)


def _unet(unet):
    """Blocks count through: each resnet with its attention, then the change of size."""
    table, levels, layers = dict(UNET), len(unet.config.block_out_channels), unet.config.layers_per_block
    for level in range(levels):
        for layer in range(layers):
            block = 1 + level * (layers + 1) + layer
            table[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{block}.0"
            table[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{block}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        for layer in range(layers + 1):
            block = level * (layers + 1) + layer
            table[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{block}.0"
            table[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{block}.1"
        last = 2 if hasattr(unet.up_blocks[level], "attentions") else 1
        table[f"up_blocks.{level}.upsamplers.0"] = f"output_blocks.{level * (layers + 1) + layers}.{last}"
    resnets = {f"{key}.{part}": f"{value}.{new}" for key, value in table.items() if "resnets" in key
               for part, new in RESNET.items()}  # fmt: skip
    return {_renamed(name, table | resnets): value for name, value in _state(unet).items()}


def _vae(vae):
    levels, tensors = len(vae.config.block_out_channels), {}
    for name, value in _state(vae).items():
        half, _, rest = name.partition(".")
        words = rest.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            side = words[0].removesuffix("_blocks")
            level = int(words[1]) if side == "down" else levels - 1 - int(words[1])
            kind = {"resnets": f"block.{words[3]}", "downsamplers": "downsample", "upsamplers": "upsample"}[words[2]]
            rest = ".".join([side, str(level), kind, *words[4:]])
        elif words[:2] == ["mid_block", "resnets"]:
            rest = ".".join(["mid", f"block_{int(words[2]) + 1}", *words[3:]])
        elif words[:2] == ["mid_block", "attentions"]:
            part = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}[words[3]]
            rest = f"mid.attn_1.{part}.{words[-1]}"
            value = value[..., None, None] if value.ndim == 2 else value
        rest = rest.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        tensors[f"{half}.{rest}" if rest else name] = value
    return tensors


def _open_clip(state):
    tensors = {"text_projection": state["text_projection.weight"].T}
    tensors["positional_embedding"] = state["text_model.embeddings.position_embedding.weight"]
    for name, value in state.items():
        if ".self_attn." in name and "out_proj" not in name:
            kind = name.rpartition(".")[2]
            block, _, rest = name.partition(".self_attn.")
            names = [f"{block}.self_attn.{letter}_proj.{kind}" for letter in "qkv"]
            block = block.replace("text_model.encoder.layers", "transformer.resblocks")
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat([state[n] for n in names])
        elif "text_projection" not in name and "position_embedding" not in name:
            for old, new in OPEN_CLIP.items():
                name = name.replace(old, new)
            tensors[name] = value
    return tensors


def _sd3(transformer):
    state, tensors = _state(transformer), {}
    last = f"transformer_blocks.{transformer.config.num_layers - 1}.norm1_context"
    for name, value in state.items():
        if name.startswith((last, "norm_out")):
            value = torch.cat(value.chunk(2)[::-1])  # diffusers has the scale first
        if not name.startswith("transformer_blocks."):
            tensors[_renamed(name, SD3) or name] = value
            continue
        _, block, rest = name.split(".", 2)
        first = {"attn.to_q": ("x_block", "to_{}"), "attn.add_q_proj": ("context_block", "add_{}_proj")}
        for key, (side, pattern) in first.items():
            if rest.startswith(f"{key}."):
                kind = rest.rpartition(".")[2]
                names = [f"transformer_blocks.{block}.attn.{pattern.format(letter)}.{kind}" for letter in "qkv"]
                tensors[f"joint_blocks.{block}.{side}.attn.qkv.{kind}"] = torch.cat([state[n] for n in names])
        if (new := _renamed(rest, SD3_BLOCK)) is not None:
            tensors[f"joint_blocks.{block}.{new}"] = value
    return tensors
