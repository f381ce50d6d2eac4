"""Quality of single pictures, by networks trained on people's ratings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.errors import not_installed
from dpdmd_pipeline.metrics.libraries import from_torchmetrics, hub_folder
from dpdmd_pipeline.metrics.passes import Passes

if TYPE_CHECKING:
    from PIL.Image import Image


class Arniqa:
    """ARNIQA (arXiv:2310.14918) with its KonIQ-10k regressor, by torchmetrics: 0 to 1, at the picture's own size."""

    def __init__(self, root: Path, passes: Passes) -> None:
        metric_class = from_torchmetrics("image.arniqa", "ARNIQA")
        with hub_folder(root):
            self.model = metric_class(regressor_dataset="koniq10k", normalize=True).model.to(passes.device)
        self.passes = passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        def score(chunk: Sequence[Image]) -> Tensor:
            return self.model(torch.stack([to_tensor(image) for image in chunk]).to(self.passes.device), True)[:, 0]

        return self.passes.run(score, images)


@contextmanager
def backbones_of_checkpoints() -> Iterator[None]:
    """Make timm build its models without pretrained weights while a model around them is built.

    MANIQA and TOPIQ request pretrained backbones from timm and overwrite them at once: their published files hold every
    parameter of the backbone and are loaded strictly, so a missing one is an error.
    """
    import timm

    create = timm.create_model
    with patch.object(timm, "create_model", lambda *args, **options: create(*args, **options | {"pretrained": False})):
        yield


class Pyiqa:
    """A metric of pyiqa, whose licence is non-commercial; the extra `[iqa]` installs it.

    Args:
        name: pyiqa's name, such as maniqa-pipal, topiq_nr or clipiqa+.
        root: folder of all weights; pyiqa's lie below it in torch.hub's layout.
    """

    def __init__(self, name: str, root: Path, passes: Passes) -> None:
        with hub_folder(root), backbones_of_checkpoints():
            try:
                import pyiqa  # reads the folder at import
            except ImportError as error:
                raise not_installed("pyiqa", "iqa") from error
            # Never pretrained=False: that gives random scores without a warning.
            self.metric = pyiqa.create_metric(name, device=passes.device)
        # Some metrics crop at random: with one picture per call, a score does not depend on other pictures.
        self.passes = Passes(passes.device, 1)

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        def score(chunk: Sequence[Image]) -> Tensor:
            torch.manual_seed(0)
            return self.metric(to_tensor(chunk[0])[None].to(self.passes.device)).flatten()

        with torch.random.fork_rng(devices=[]):
            return self.passes.run(score, images)
