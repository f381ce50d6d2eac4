"""From clean records to embeddings: which rows there are, what tokenizers cut off, and the encoding itself."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.planning.identity import texts_digest

if TYPE_CHECKING:
    from dpdmd_pipeline.backbones.base import TokenLimit

_BATCH = 1024  # texts tokenized at once; changes no result


@dataclass(frozen=True)
class Rows:
    """The rows of the embeddings: the prompts, then the empty prompt.

    Attributes:
        digest: SHA-256 of the prompts in their order.
    """

    prompts: PromptFile
    num_prompts: int
    digest: str

    def __len__(self) -> int:
        return self.num_prompts + 1

    def texts(self, start: int, stop: int) -> list[str]:
        """Rows start <= i < stop; only these are read into memory."""
        found = [record["text"] for record in self.prompts.records(start, min(stop, self.num_prompts))]
        return [*found, ""] if stop > self.num_prompts else found


def rows_of(prompts: PromptFile) -> Rows:
    """Read the prompts once.

    Raises:
        ValueError: if there is none.
    """
    count = sum(1 for _ in prompts)
    if not count:
        raise ValueError(f"{prompts.path} has no prompts: run `kedro run --pipelines prompts`")
    return Rows(prompts, count, texts_digest(prompts))


def truncated_rows(
    rows: Rows, teacher: Path, limits: Mapping[str, "TokenLimit"]
) -> Iterator[tuple[int, str, dict[str, int]]]:
    """Prompts that do not fit, as (row, text, tokens lost by tokenizer); special tokens take room, too.

    The tokenizers are loaded if some text may be too long: of ASCII, every token takes a character, and
    no tokenizer adds more than two.
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
        for place, (row, text) in enumerate(chunk):
            over = {name: counts[name][place] - limit.tokens for name, limit in limits.items()}
            if lost := {name: tokens for name, tokens in over.items() if tokens > 0}:
                yield row, text, lost


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def encode_rows(rows: Rows, start: int, stop: int, load_backbone: Callable[[], Any], batch_size: int) -> dict[str, Any]:
    """Embeddings of rows start <= i < stop, on the CPU, as `Backbone.encode` names them."""
    import torch

    texts, backbone = rows.texts(start, stop), load_backbone()
    with _quiet():
        parts = [backbone.encode(texts[first : first + batch_size]) for first in range(0, len(texts), batch_size)]
    return {name: torch.cat([part[name].cpu() for part in parts]) for name in parts[0]}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the libraries from saying again, for each prompt and tokenizer, what `truncated_rows` has found."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    before = [library.get_verbosity() for library in libraries]
    try:
        for library in libraries:
            library.set_verbosity_error()
        yield
    finally:
        for library, verbosity in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
