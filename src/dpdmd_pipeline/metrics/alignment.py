"""How well a picture fits its prompt, by models that embed both: CLIP score, PickScore, HPSv2.1.

Each is called with the text of a prompt and its pictures, and returns one number a picture, [n].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.metrics.embedders import create_open_clip, load_open_clip, load_pretrained
from dpdmd_pipeline.metrics.passes import Passes

if TYPE_CHECKING:
    from PIL.Image import Image


class OpenClipScore:
    """Cosine of picture and prompt in an open_clip model, times a factor.

    Args:
        model, preprocess, tokenizer: as open_clip gives them.
        factor: 100 for the CLIP score of torchmetrics, 1 for HPSv2.
        floor: least value, 0 for the CLIP score (arXiv:2104.08718).
        passes: how it is run.
    """

    def __init__(
        self, model: nn.Module, preprocess: Any, tokenizer: Any, factor: float, floor: float | None, passes: Passes
    ) -> None:
        self.model, self.preprocess, self.tokenizer = model.to(passes.device), preprocess, tokenizer
        self.factor, self.floor, self.passes = factor, floor, passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        embedded = self.passes.run(self._embed_text, [text])[0].to(self.passes.device)
        cosine = self.passes.run(lambda chunk: self._embed(chunk) @ embedded, images)
        return self.factor * (cosine if self.floor is None else cosine.clamp(min=self.floor))

    def _embed(self, images: Sequence[Image]) -> Tensor:
        pixels = torch.stack([self.preprocess(image) for image in images])
        return self.model.encode_image(pixels.to(self.passes.device), normalize=True)

    def _embed_text(self, texts: Sequence[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(list(texts)).to(self.passes.device), normalize=True)


def clip_score(folder: Path, passes: Passes) -> OpenClipScore:
    """100 max(cos, 0) with the model of a folder."""
    return OpenClipScore(*load_open_clip(folder), factor=100.0, floor=0.0, passes=passes)


def hps_score(architecture: str, file: Path, passes: Passes) -> OpenClipScore:
    """HPSv2 (arXiv:2306.09341): the cosine, with the longest side resized and the rest padded, as its code does.

    Args:
        architecture: open_clip's name of it, ViT-H-14 for the published file.
        file: of the weights.
        passes: how it is run.
    """
    import open_clip

    model, preprocess = create_open_clip(architecture, pretrained=str(file), image_resize_mode="longest")
    return OpenClipScore(model, preprocess, open_clip.get_tokenizer(architecture), 1.0, None, passes)


class PickScore:
    """PickScore (arXiv:2305.01569): the trained temperature times the cosine, in a CLIP of transformers."""

    def __init__(self, folder: Path, passes: Passes) -> None:
        from transformers import AutoModel, AutoProcessor

        self.model = load_pretrained(AutoModel, folder, dtype=torch.float32).to(passes.device)
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.passes = passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        return self.passes.run(lambda chunk: self._score(text, chunk), images)

    def _score(self, text: str, images: Sequence[Image]) -> Tensor:
        tokens = self.processor(text=[text], padding=True, truncation=True, max_length=77, return_tensors="pt")
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        image = F.normalize(_embedding(self.model.get_image_features(pixels.to(self.passes.device))), dim=-1)
        text_features = self.model.get_text_features(**tokens.to(self.passes.device))
        return self.model.logit_scale.exp() * (image @ F.normalize(_embedding(text_features), dim=-1)[0])


def _embedding(found: Any) -> Tensor:
    """transformers 5 wraps what 4 returned as it was."""
    return found if torch.is_tensor(found) else found.pooler_output
