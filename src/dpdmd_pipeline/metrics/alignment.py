"""How well a picture fits its prompt, by models that embed both: CLIP score, PickScore, HPSv2.1.

Each is called with the text of a prompt and its pictures, and returns one number a picture, [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.metrics.embedders import (
    Embedder,
    OpenClipVision,
    create_open_clip,
    load_open_clip,
    load_pretrained,
)
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.metrics.weights import UnfitError

if TYPE_CHECKING:
    from PIL.Image import Image

_PICK_TOKENS = 77  # CLIP's, start and end included


class OpenClipScore:
    """Cosine of picture and prompt in an open_clip model, times a factor.

    Args:
        model, tokenizer: as open_clip gives them.
        embed: the model's image side; its features may be shared with metrics of diversity.
        factor: 100 for the CLIP score of torchmetrics, 1 for HPSv2.
        floor: least value, 0 for the CLIP score (arXiv:2104.08718).
        passes: how it is run.
    """

    def __init__(
        self, model: nn.Module, embed: Embedder, tokenizer: Any, factor: float, floor: float | None, passes: Passes
    ) -> None:
        self.model, self.embed, self.tokenizer = model.to(passes.device), embed, tokenizer
        self.factor, self.floor, self.passes = factor, floor, passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        """One number a picture, [n].

        Raises:
            UnfitError: if the tokenizer does not know a word of the text, which would be judged without it.
        """
        unknown = unknown_words(self.tokenizer, text)
        if unknown:
            told = f"prompt {text!r} has words that the network's tokenizer does not know ({', '.join(unknown)})"
            raise UnfitError(f"{told}: it judges prompts of its own world only")
        embedded = self.passes.run(self._embed_text, [text])[0].to(self.passes.device)
        cosine = self.passes.run(lambda rows: _unit(rows.to(embedded.device)) @ embedded, self.embed(images))
        return self.factor * (cosine if self.floor is None else cosine.clamp(min=self.floor))

    def cut_at(self, text: str) -> int | None:
        """Tokens that are read of a text which has more; None where all are read."""
        limit = self.tokenizer.context_length
        read, longer = (self.tokenizer([text], context_length=size)[0] for size in (limit, limit + 1))
        # The sign of the end stands last in what was cut, one place further in the longer row.
        return None if torch.equal(read, longer[:limit]) else limit

    def _embed_text(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.passes.device), normalize=True)


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Words that become a tokenizer's sign for unknown ones; of one that knows all bytes, none."""
    inner = getattr(tokenizer, "tokenizer", None)  # one of transformers
    sign = getattr(inner, "unk_token_id", None)
    if sign is None or sign in (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id):  # CLIP's own: never used
        return []
    found = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    places = zip(found["input_ids"], found["offset_mapping"], strict=True)
    return [text[start:end] for token, (start, end) in places if token == sign]


def clip_score(
    folder: Path,
    passes: Passes,
    side: int | None = None,
    share: Callable[[Embedder], Embedder] = lambda embed: embed,
) -> OpenClipScore:
    """100 max(cos, 0) with the model of a folder.

    Args:
        folder: of the model.
        passes: how it is run.
        side: as in OpenClipVision.
        share: what makes the image side one that other metrics look through too.
    """
    model, preprocess, tokenizer = load_open_clip(folder)
    embed = share(OpenClipVision(model, preprocess, passes, side))
    return OpenClipScore(model, embed, tokenizer, factor=100.0, floor=0.0, passes=passes)


def hps_score(architecture: str, file: Path, passes: Passes) -> OpenClipScore:
    """HPSv2 (arXiv:2306.09341): the cosine, with the longest side resized and the rest padded, as its code does.

    Args:
        architecture: open_clip's name of it, ViT-H-14 for the published file.
        file: of the weights.
        passes: how it is run.
    """
    import open_clip

    model, preprocess = create_open_clip(architecture, pretrained=str(file), image_resize_mode="longest")
    embed = OpenClipVision(model, preprocess, passes)
    return OpenClipScore(model, embed, open_clip.get_tokenizer(architecture), 1.0, None, passes)


class PickScore:
    """PickScore (arXiv:2305.01569): the trained temperature times the cosine, in a CLIP of transformers."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        from transformers import AutoModel, AutoProcessor

        self.model = load_pretrained(AutoModel, folder, dtype=torch.float32).to(passes.device)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.passes = passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        return self.passes.run(lambda chunk: self._score(text, chunk), images)

    def cut_at(self, text: str) -> int | None:
        """Tokens that are read of a text which has more; None where all are read."""
        tokens = self.processor.tokenizer(text, truncation=True, max_length=_PICK_TOKENS + 1)["input_ids"]
        return _PICK_TOKENS if len(tokens) > _PICK_TOKENS else None

    def _score(self, text: str, images: Sequence[Image]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": _PICK_TOKENS, "return_tensors": "pt"}
        tokens = self.processor(text=[text], **options)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        image = _unit(_embedding(self.model.get_image_features(pixels.to(self.passes.device))))
        text_features = self.model.get_text_features(**tokens.to(self.passes.device))
        return self.model.logit_scale.exp() * (image @ _unit(_embedding(text_features))[0])


def _embedding(found: Any) -> Tensor:
    """transformers 5 wraps what 4 returned as it was."""
    return found if torch.is_tensor(found) else found.pooler_output


def _unit(rows: Tensor) -> Tensor:
    """Rows [n, d], each of length 1."""
    return F.normalize(rows, dim=-1)
