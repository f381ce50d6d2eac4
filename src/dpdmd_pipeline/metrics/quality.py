"""How good a picture is by itself, from networks that were trained on people's ratings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.metrics.weights import MissingLibraryError, hub_folder

if TYPE_CHECKING:
    from PIL.Image import Image


class Arniqa:
    """ARNIQA (arXiv:2310.14918) with its KonIQ-10k regressor, by torchmetrics: 0 to 1, at the picture's own size."""

    def __init__(self, root: Path, passes: Passes) -> None:
        try:
            from torchmetrics.image.arniqa import ARNIQA
        except ImportError as error:
            raise MissingLibraryError("torchmetrics is not installed: pip install 'dpdmd-pipeline[metrics]'") from error
        with hub_folder(root):
            self.model = ARNIQA(regressor_dataset="koniq10k", normalize=True).model.to(passes.device)
        self.passes = passes

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        def score(chunk: Sequence[Image]) -> Tensor:
            return self.model(torch.stack([to_tensor(image) for image in chunk]).to(self.passes.device), True)[:, 0]

        return self.passes.run(score, images)


@contextmanager
def backbones_of_checkpoints() -> Iterator[None]:
    """Let timm build its models without weights of their own, for as long as a model around them is being built.

    MANIQA and TOPIQ ask timm for pretrained backbones and overwrite them at once: their published files hold every
    parameter of the backbone, and are loaded strictly, so that one left at random would be an error.
    """
    import timm

    before = timm.create_model
    timm.create_model = lambda name, *args, **options: before(name, *args, **options | {"pretrained": False})
    try:
        yield
    finally:
        timm.create_model = before


class Pyiqa:
    """A metric of pyiqa, which is licensed for non-commercial use only: the extra `[iqa]` installs it.

    Args:
        name: pyiqa's, as in maniqa-pipal, topiq_nr, clipiqa+.
        root: of all weights; pyiqa's are below it as torch.hub keeps them.
        passes: how it is run.
    """

    def __init__(self, name: str, root: Path, passes: Passes) -> None:
        with hub_folder(root), backbones_of_checkpoints():
            try:
                import pyiqa  # looks up the folder when it is imported
            except ImportError as error:
                raise MissingLibraryError("pyiqa is not installed: pip install 'dpdmd-pipeline[iqa]'") from error
            # Never pretrained=False: it returns a random score without a word.
            self.metric = pyiqa.create_metric(name, device=passes.device)
        # Some crop at random, reseeded per call: one picture a call keeps a score its own.
        self.passes = Passes(passes.device, 1)

    def __call__(self, text: str, images: Sequence[Image]) -> Tensor:
        from torchvision.transforms.functional import to_tensor

        def score(chunk: Sequence[Image]) -> Tensor:
            torch.manual_seed(0)
            return self.metric(to_tensor(chunk[0])[None].to(self.passes.device)).flatten()

        with torch.random.fork_rng(devices=[]):
            return self.passes.run(score, images)
