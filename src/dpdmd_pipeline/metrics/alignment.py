"""Scores of pictures against their prompt, by models that embed both: CLIP score, PickScore, HPSv2.1.

Each takes the text of a prompt and its n pictures and returns one number per picture, [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.metrics import embedders
from dpdmd_pipeline.metrics.embedders import Embedder, OpenClipVision
from dpdmd_pipeline.metrics.errors import UnfitError
from dpdmd_pipeline.metrics.passes import Passes

if TYPE_CHECKING:
    from PIL.Image import Image

_PICK_TOKENS = 77  # CLIP's limit, start and end tokens included


@dataclass
class OpenClipScore:
    """Cosine of picture and prompt in an open_clip model, times a factor."""

    model: nn.Module  # from open_clip, on the device of its image side
    embed: Embedder  # the model's image side; metrics of diversity may share its features
    tokenizer: Any
    factor: float  # 100 for the CLIP score of torchmetrics, 1 for HPSv2
    floor: float | None  # lower bound, 0 for the CLIP score (arXiv:2104.08718)
    passes: Passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        unknown = unknown_words(self.tokenizer, text)
        if unknown:  # the score would ignore these words
            raise UnfitError(
                f"the network's tokenizer does not know some words of prompt {text!r} ({', '.join(unknown)}): "
                "use it for prompts of its own world only"
            )
        device = self.passes.device
        tokens = self.tokenizer([text]).to(device)
        direction = self.passes.run(lambda _: self.model.encode_text(tokens, normalize=True), [text])[0].to(device)
        cosine = self.passes.run(lambda rows: F.normalize(rows.to(device), dim=-1) @ direction, self.embed(images))
        return self.factor * (cosine if self.floor is None else cosine.clamp(min=self.floor))

    def cut_at(self, text: str) -> int | None:
        """Number of tokens read if the text has more, else None."""
        limit = self.tokenizer.context_length
        tokens, longer = (self.tokenizer([text], context_length=size)[0] for size in (limit, limit + 1))
        # A cut text ends with the end token in both rows, one token later in the longer one.
        return None if torch.equal(tokens, longer[:limit]) else limit


def unknown_words(tokenizer: Any, text: str) -> list[str]:
    """Words that a tokenizer maps to its unknown token; none for a tokenizer that knows all bytes."""
    inner = getattr(tokenizer, "tokenizer", None)  # a tokenizer of transformers
    unknown_id = getattr(inner, "unk_token_id", None)
    # CLIP's own tokenizer names its end token as unknown token and never uses it.
    if unknown_id is None or unknown_id in (inner.bos_token_id, inner.eos_token_id, inner.pad_token_id):
        return []
    encoding = inner(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
    return [text[start:end] for token, (start, end) in spans if token == unknown_id]


def clip_score(
    folder: Path, passes: Passes, side: int | None = None, share: Callable[[Embedder], Embedder] = lambda embed: embed
) -> OpenClipScore:
    """The CLIP score, 100 max(cos, 0), with the model of a folder.

    Args:
        side: as in OpenClipVision.
        share: wraps the image side so that other metrics reuse its features.
    """
    model, preprocess, tokenizer = embedders.load_open_clip(folder)
    embed = share(OpenClipVision(model, preprocess, passes, side))
    return OpenClipScore(model, embed, tokenizer, factor=100.0, floor=0.0, passes=passes)


def hps_score(architecture: str, file: Path, passes: Passes) -> OpenClipScore:
    """HPSv2 (arXiv:2306.09341): the cosine; pictures are resized by their longest side and padded, as in its code.

    The `architecture` is open_clip's name, ViT-H-14 for the published file.
    """
    import open_clip

    model, preprocess = embedders.create_open_clip(architecture, pretrained=str(file), image_resize_mode="longest")
    embed = OpenClipVision(model, preprocess, passes)
    return OpenClipScore(model, embed, open_clip.get_tokenizer(architecture), 1.0, None, passes)


class PickScore:
    """PickScore (arXiv:2305.01569): the cosine in a CLIP of transformers, times its trained temperature."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        from transformers import AutoModel, AutoProcessor

        self.model = embedders.load_pretrained(AutoModel, folder, dtype=torch.float32).to(passes.device)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.passes = passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        return self.passes.run(lambda chunk: self._score(text, chunk), images)

    def cut_at(self, text: str) -> int | None:
        """Number of tokens read if the text has more, else None."""
        tokens = self.processor.tokenizer(text, truncation=True, max_length=_PICK_TOKENS + 1)["input_ids"]
        return _PICK_TOKENS if len(tokens) > _PICK_TOKENS else None

    def _score(self, text: str, images: Sequence[Image]) -> Tensor:
        options = {"padding": True, "truncation": True, "max_length": _PICK_TOKENS, "return_tensors": "pt"}
        tokens = self.processor(text=[text], **options)
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        image = _direction(self.model.get_image_features(pixels.to(self.passes.device)))
        prompt = _direction(self.model.get_text_features(**tokens.to(self.passes.device)))
        return self.model.logit_scale.exp() * (image @ prompt[0])


def _direction(output: Any) -> Tensor:
    """Features [n, d] of length 1; transformers 4 returns the tensor, 5 wraps it."""
    return F.normalize(output if torch.is_tensor(output) else output.pooler_output, dim=-1)
