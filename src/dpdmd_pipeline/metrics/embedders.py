"""Pictures to features. Each class is one published protocol; all take Pillow pictures and return [n, d]."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.metrics.weights import MissingLibraryError, UnfitError

if TYPE_CHECKING:
    from PIL.Image import Image


class Embedder(Protocol):
    """Pictures in, one row of features each."""

    def __call__(self, images: Sequence[Image]) -> Tensor: ...


def load_pretrained(kind: Any, folder: Path, **options: Any) -> nn.Module:
    """A transformers model of a folder, whole or not at all.

    Raises:
        ValueError: if the file lacks some of the model's weights, which would otherwise be random.
    """
    model, loaded = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    return model.requires_grad_(False).eval()


def load_open_clip(folder: Path) -> tuple[nn.Module, Any, Any]:
    """Model, preprocessing and tokenizer of a folder in open_clip's own layout.

    A file that does not fit the model raises; a folder without one too, where open_clip alone would go on with
    random weights and a line in the log.
    """
    import open_clip

    name = f"local-dir:{folder}"
    model, preprocess = create_open_clip(name)
    return model, preprocess, open_clip.get_tokenizer(name)


def create_open_clip(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """Model and preprocessing, with weights or not at all.

    Raises:
        ValueError: if the weights are not there, or not of this model.
    """
    import open_clip

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True, **options)
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise ValueError(f"{options.get('pretrained', name)} does not fit or has no weights: {told[:300]}") from error
    return model.requires_grad_(False).eval(), preprocess


class TransformersVision:
    """A vision model of transformers behind its own image processor.

    Args:
        folder: with config, preprocessor and weights.
        tokens: `pooled` is `pooler_output`; `patches` are the normalised patch tokens side by side, so that the
            cosine of two rows is the mean cosine of patches at the same place; `raw_cls` is the first token of
            `last_hidden_state`, of a CLIP before its final norm and projection.
        passes: how it is run.
    """

    def __init__(self, folder: Path, tokens: Literal["pooled", "patches", "raw_cls"], passes: Passes) -> None:
        from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

        is_clip = json.loads((Path(folder) / "config.json").read_text()).get("model_type", "").startswith("clip")
        model = load_pretrained(CLIPVisionModel if is_clip else AutoModel, folder, dtype=torch.float32)
        self.model = model.to(passes.device)
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokens, self.passes = tokens, passes

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self.passes.run(self._embed, images)

    def _embed(self, images: Sequence[Image]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.passes.device)
        found = self.model(pixel_values=pixels)
        if self.tokens == "pooled":
            return found.pooler_output
        if self.tokens == "raw_cls":
            return found.last_hidden_state[:, 0]
        # class token and, in DINOv3, registers come first
        registers = getattr(self.model.config, "num_register_tokens", 0)
        patches = F.normalize(found.last_hidden_state[:, 1 + registers :], dim=-1)
        return patches.flatten(1) / patches.shape[1] ** 0.5


def only_of_side(preprocess: Callable[[Image], Tensor], side: int | None) -> Callable[[Image], Tensor]:
    """A preprocessing that refuses pictures of another size than its world's; None for a model of any pictures."""
    if side is None:
        return preprocess

    def checked(image: Image) -> Tensor:
        if image.size != (side, side):
            width, height = image.size
            raise UnfitError(f"pictures have {width} x {height} pixels, those of its world {side} x {side}")
        return preprocess(image)

    return checked


class OpenClipVision:
    """Projected image embeddings of an open_clip model, before normalisation.

    Args:
        model, preprocess: as open_clip gives them.
        passes: how it is run.
        side: pixels that pictures must have, of a model that knows one world only.
    """

    def __init__(self, model: nn.Module, preprocess: Any, passes: Passes, side: int | None = None) -> None:
        self.preprocess = only_of_side(preprocess, side)
        self.model, self.passes = model.to(passes.device), passes

    @classmethod
    def of(cls, folder: Path, passes: Passes, side: int | None = None) -> Self:
        """Those of a folder's model."""
        model, preprocess, _ = load_open_clip(folder)
        return cls(model, preprocess, passes, side)

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self.passes.run(self._embed, images)

    def _embed(self, images: Sequence[Image]) -> Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(image) for image in images]).to(self.passes.device))


class Inception:
    """The 2048 features of FID's Inception network, resized as its first code did (bilinear, no antialias)."""

    num_features = 2048

    def __init__(self, file: Path, passes: Passes) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file), antialias=False)
        except ModuleNotFoundError as error:
            raise MissingLibraryError(
                "torch-fidelity is not installed: pip install 'dpdmd-pipeline[metrics]'"
            ) from error
        self.network, self.passes = network.to(passes.device), passes

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self.passes.run(self._embed, images)

    def _embed(self, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        pixels = torch.stack([pil_to_tensor(image) for image in images]).to(self.passes.device)
        return self.network(pixels)


class Lpips:
    """LPIPS (arXiv:1801.03924) of all pairs i < j of a prompt, by torchmetrics.

    Args:
        network: alex, the protocol of the diversity literature; squeeze is the small one.
        root: of all weights; the network's own are below it as torch.hub keeps them.
        side: pixels to which pictures are resized, bilinear.
        passes: how it is run.
    """

    def __init__(self, network: Literal["alex", "squeeze"], root: Path, side: int, passes: Passes) -> None:
        from dpdmd_pipeline.metrics.weights import hub_folder

        try:
            from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity
        except ImportError as error:
            raise MissingLibraryError("torchmetrics is not installed: pip install 'dpdmd-pipeline[metrics]'") from error
        with hub_folder(root):
            metric = LearnedPerceptualImagePatchSimilarity(network, reduction="none", normalize=True)
        self.metric, self.side, self.passes = metric.to(passes.device), side, passes

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Distances of all pairs, [n (n - 1) / 2]."""
        from torchvision.transforms.functional import resize, to_tensor

        pixels = [to_tensor(resize(image, [self.side, self.side])) for image in images]
        pairs = [(pixels[j], pixels[i]) for i in range(len(pixels)) for j in range(i)]
        return self.passes.run(self._distances, pairs)

    def _distances(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        one, two = (torch.stack(side).to(self.passes.device) for side in zip(*pairs, strict=True))
        return self.metric.net(one, two, normalize=True).flatten()
