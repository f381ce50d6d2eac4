"""Networks that turn Pillow pictures into features [n, d]; each class is one published protocol."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdmd_pipeline.metrics.errors import UnfitError, not_installed
from dpdmd_pipeline.metrics.libraries import from_torchmetrics, hub_folder
from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.wording import one_line

if TYPE_CHECKING:
    from PIL.Image import Image

Embedder = Callable[[Sequence[Any]], Tensor]  # from n Pillow pictures to features [n, d]


def load_pretrained(model_class: Any, folder: Path, **options: Any) -> nn.Module:
    """Load a complete transformers model from a folder.

    Raises:
        ValueError: if the file lacks some of the model's weights, which would otherwise be random.
    """
    options |= {"local_files_only": True, "trust_remote_code": False}
    model, loaded = model_class.from_pretrained(folder, output_loading_info=True, **options)
    missing = sorted(loaded["missing_keys"]) + sorted(str(key) for key in loaded["mismatched_keys"])
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} weights of {type(model).__name__}, first {missing[0]}")
    return model.requires_grad_(False).eval()


def load_open_clip(folder: Path) -> tuple[nn.Module, Any, Any]:
    """Load model, preprocessing and tokenizer from a folder in open_clip's own layout."""
    import open_clip

    name = f"local-dir:{folder}"
    model, preprocess = create_open_clip(name)
    return model, preprocess, open_clip.get_tokenizer(name)


def create_open_clip(name: str, **options: Any) -> tuple[nn.Module, Any]:
    """Create model and preprocessing with pretrained weights.

    Raises:
        ValueError: if the weights are missing or do not fit; open_clip alone would log a line and use random ones.
    """
    import open_clip

    try:
        model, _, preprocess = open_clip.create_model_and_transforms(name, require_pretrained=True, **options)
    except RuntimeError as error:
        raise ValueError(
            f"{options.get('pretrained', name)} does not fit or has no weights: {one_line(error)[:300]}"
        ) from error
    return model.requires_grad_(False).eval(), preprocess


class _Network:
    """A network that embeds pictures, as many at once as `passes` allows."""

    passes: Passes

    def __call__(self, images: Sequence[Image]) -> Tensor:
        return self.passes.run(self._embed, images)


class TransformersVision(_Network):
    """A vision model of transformers behind its own image processor.

    Args:
        tokens: `pooled` is `pooler_output`; `patches` are the normalised patch tokens side by side, so that the
            cosine of two rows is the mean cosine of patches at the same position; `raw_cls` is the first token of
            `last_hidden_state`, which a CLIP has before its final norm and projection.
    """

    def __init__(self, folder: Path, tokens: Literal["pooled", "patches", "raw_cls"], passes: Passes) -> None:
        from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

        is_clip = json.loads((Path(folder) / "config.json").read_text()).get("model_type", "").startswith("clip")
        model = load_pretrained(CLIPVisionModel if is_clip else AutoModel, folder, dtype=torch.float32)
        self.model = model.to(passes.device)
        self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        self.tokens, self.passes = tokens, passes

    def _embed(self, images: Sequence[Image]) -> Tensor:
        pixels = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.passes.device)
        output = self.model(pixel_values=pixels)
        if self.tokens == "pooled":
            return output.pooler_output
        if self.tokens == "raw_cls":
            return output.last_hidden_state[:, 0]
        # The class token and DINOv3's registers come first.
        registers = getattr(self.model.config, "num_register_tokens", 0)
        patches = F.normalize(output.last_hidden_state[:, 1 + registers :], dim=-1)
        return patches.flatten(1) / patches.shape[1] ** 0.5


class OpenClipVision(_Network):
    """Projected image embeddings of an open_clip model, before normalisation.

    Args:
        model, preprocess: from open_clip.
        side: required side of the pictures in pixels, for a model of one world only.
    """

    def __init__(self, model: nn.Module, preprocess: Any, passes: Passes, side: int | None = None) -> None:
        self.model, self.preprocess, self.passes, self.side = model.to(passes.device), preprocess, passes, side

    @classmethod
    def of(cls, folder: Path, passes: Passes, side: int | None = None) -> Self:
        """Load the model of a folder."""
        model, preprocess, _ = load_open_clip(folder)
        return cls(model, preprocess, passes, side)

    def _embed(self, images: Sequence[Image]) -> Tensor:
        for width, height in (image.size for image in images):
            if self.side is not None and (width, height) != (self.side, self.side):
                raise UnfitError(
                    f"pictures have {width} x {height} pixels; this network needs {self.side} x {self.side}"
                )
        return self.model.encode_image(torch.stack([self.preprocess(image) for image in images]).to(self.passes.device))


class Inception(_Network):
    """The 2048 features of FID's Inception network, resized as in its first code (bilinear, no antialias)."""

    def __init__(self, file: Path, passes: Passes) -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            network = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(file), antialias=False)
        except ModuleNotFoundError as error:
            raise not_installed("torch-fidelity") from error
        self.network, self.passes = network.to(passes.device), passes

    def _embed(self, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import pil_to_tensor

        pixels = torch.stack([pil_to_tensor(image) for image in images]).to(self.passes.device)
        return self.network(pixels)


class Lpips:
    """LPIPS (arXiv:1801.03924) of all pairs of a prompt's pictures, by torchmetrics.

    Args:
        network: alex is the protocol of the diversity literature, squeeze the small network.
        root: folder of all weights; this network's lie below it in torch.hub's layout.
        side: side in pixels of the square to which pictures are resized, bilinear.
    """

    def __init__(self, network: Literal["alex", "squeeze"], root: Path, side: int, passes: Passes) -> None:
        metric_class = from_torchmetrics("image.lpip", "LearnedPerceptualImagePatchSimilarity")
        with hub_folder(root):
            metric = metric_class(network, reduction="none", normalize=True)
        self.metric, self.side, self.passes = metric.to(passes.device), side, passes

    def __call__(self, images: Sequence[Image]) -> Tensor:
        """Distances of the pairs (1, 0), (2, 0), (2, 1), ..., [n (n - 1) / 2]."""
        from torchvision.transforms.functional import resize, to_tensor

        pixels = [to_tensor(resize(image, [self.side, self.side])) for image in images]
        pairs = [(pixels[j], pixels[i]) for i in range(len(pixels)) for j in range(i)]
        return self.passes.run(self._distances, pairs)

    def _distances(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        one, two = (torch.stack(side).to(self.passes.device) for side in zip(*pairs, strict=True))
        return self.metric.net(one, two, normalize=True).flatten()
