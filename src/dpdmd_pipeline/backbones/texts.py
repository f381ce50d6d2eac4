"""Prompts of different lengths as tensors of one shape, and the limits of tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from dpdmd_pipeline.limits import read_json

Conditioning = dict[str, Tensor]  # batch-first; fits a safetensors shard as it is


def padded(embeds: Sequence[Tensor], tokens: int) -> Conditioning:
    """Embeddings of prompts of their own lengths, [L_i, D], as tensors of one shape: padded by zeros, with a mask.

    One shape for all prompts lets samples of any prompts stand in one batch, one shard and one checkpoint.
    """
    filled = [torch.cat([value, value.new_zeros(tokens - len(value), value.shape[1])]) for value in embeds]
    masks = [torch.arange(tokens, device=value.device) < len(value) for value in embeds]
    return {"prompt_embeds": torch.stack(filled), "prompt_mask": torch.stack(masks).to(embeds[0].dtype)}


def prompt_lengths(cond: Conditioning) -> list[int]:
    """Number of tokens of each prompt that are no padding, which stands at the end."""
    mask = cond["prompt_mask"]
    if mask.is_meta or isinstance(mask, FakeTensor):  # estimates have no numbers: they take the longest prompts
        return [mask.shape[1]] * len(mask)
    return mask.bool().sum(dim=1).tolist()


# ---- prompts that are too long


def count_tokens(tokenizer: Any, prompts: Sequence[str]) -> list[int]:
    """Count the tokens of each prompt, special ones included."""
    return [len(ids) for ids in tokenizer(list(prompts), verbose=False)["input_ids"]]


def count_chat_tokens(tokenizer: Any, prompts: Sequence[str], **template: Any) -> list[int]:
    """Count the tokens of each prompt with the tokenizer's chat template around it, as `encode_prompt` writes it."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"tokenize": False, "add_generation_prompt": True, **template}
    return count_tokens(tokenizer, [tokenizer.apply_chat_template(chat, **options) for chat in chats])


@dataclass(frozen=True)
class TokenLimit:
    """The length to which a tokenizer truncates prompts."""

    tokens: int  # the most of a prompt
    count: Callable[[Any, Sequence[str]], list[int]] = count_tokens  # of each prompt, as this limit counts them


def tokenizer_names(folder: Path) -> list[str]:
    """Folders of a teacher's tokenizers, without those that have no text encoder."""
    names = sorted(path.parent.name for path in folder.glob("tokenizer*/tokenizer_config.json"))
    return [name for name in names if (folder / name.replace("tokenizer", "text_encoder")).is_dir()]


def tokenizer_length(tokenizer: Path) -> int:
    """The most tokens that the text encoder takes, by the config in a tokenizer's folder; special ones included."""
    return int(read_json(tokenizer / "tokenizer_config.json")["model_max_length"])
