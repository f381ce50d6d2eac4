"""Rows of the embeddings: their texts, their truncation by tokenizers, and their encoding."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dpdmd_pipeline.datasets.prompt_file import PromptFile

_BATCH = 1024  # texts tokenized at once; does not change results


@dataclass(frozen=True)
class Rows:
    """The rows of the embeddings: the prompts, then the empty prompt."""

    prompts: PromptFile
    num_prompts: int

    def __len__(self) -> int:
        return self.num_prompts + 1

    def texts(self, start: int, stop: int) -> list[str]:
        """Read rows start <= i < stop; only these are in memory."""
        texts = [record["text"] for record in self.prompts.records(start, min(stop, self.num_prompts))]
        return [*texts, ""] if stop > self.num_prompts else texts


def truncated_rows(rows: Rows, teacher: Path, limits: Mapping[str, Any]) -> Iterator[tuple[int, str, dict[str, int]]]:
    """Find the prompts beyond the `token_limits`, as (row, text, tokens lost by tokenizer); special tokens count too.

    Tokenizers are loaded only if a text may be too long: an ASCII text has at most one token per character, and no
    tokenizer adds more than two.
    """
    tokenizers: dict[str, Any] = {}
    shortest = min((limit.tokens for limit in limits.values()), default=0)
    long = (
        (row, record["text"])
        for row, record in enumerate(rows.prompts)
        if not record["text"].isascii() or len(record["text"]) + 2 > shortest
    )
    while limits and (chunk := list(islice(long, _BATCH))):
        tokenizers = tokenizers or {name: _load_tokenizer(teacher / name) for name in limits}
        texts = [text for _, text in chunk]
        counts = {name: limits[name].count(tokenizer, texts) for name, tokenizer in tokenizers.items()}
        for index, (row, text) in enumerate(chunk):
            excess = {name: counts[name][index] - limit.tokens for name, limit in limits.items()}
            if lost := {name: tokens for name, tokens in excess.items() if tokens > 0}:
                yield row, text, lost


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_rows(rows: Rows, start: int, stop: int, load_backbone: Callable[[], Any], batch_size: int) -> dict[str, Any]:
    """Encode rows start <= i < stop; returns embeddings on the CPU, named as by `Backbone.encode`."""
    import torch

    from dpdmd_pipeline.backbones.networks import quiet

    texts, backbone = rows.texts(start, stop), load_backbone()
    with quiet():  # of truncated texts, which `truncated_rows` has reported
        batches = [backbone.encode(texts[first : first + batch_size]) for first in range(0, len(texts), batch_size)]
    return {name: torch.cat([batch[name].cpu() for batch in batches]) for name in batches[0]}
