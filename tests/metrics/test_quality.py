import pytest
import torch
from tests.raising import refuses
from torch import nn

from dpdmd_pipeline.metrics.errors import MissingLibraryError
from dpdmd_pipeline.metrics.libraries import hub_folder
from dpdmd_pipeline.metrics.quality import Arniqa, Pyiqa, backbones_of_checkpoints


class Regressor(nn.Module):
    """The linear regressor, with the names of its file."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.randn(1, 4096))
        self.biases = nn.Parameter(torch.tensor(50.0))

    def forward(self, features):
        return features @ self.weights.T + self.biases


@pytest.fixture(scope="module")
def arniqa_weights(tmp_path_factory):
    """Random weights in the published kinds of file: a state under `model.`, and a TorchScript regressor."""
    from torchvision.models import resnet50

    root = tmp_path_factory.mktemp("weights")
    checkpoints = root / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    torch.manual_seed(0)
    encoder = nn.Sequential(*list(resnet50().children())[:-1])
    torch.save({f"model.{name}": value for name, value in encoder.state_dict().items()}, checkpoints / "ARNIQA.pth")
    torch.jit.save(torch.jit.script(Regressor()), checkpoints / "regressor_koniq10k.pth")
    return root


def test_arniqa_is_torchmetrics_picture_by_picture(arniqa_weights, photos, passes):
    from torchmetrics.functional.image.arniqa import arniqa
    from torchvision.transforms.functional import to_tensor

    scores = Arniqa(arniqa_weights, passes)("", photos[:2])
    with hub_folder(arniqa_weights), torch.no_grad():
        expected = arniqa(torch.stack([to_tensor(photo) for photo in photos[:2]]), reduction="none", normalize=True)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert scores[0] != scores[1]


def test_a_missing_pyiqa_is_named_with_its_extra(monkeypatch, tmp_path, passes):
    monkeypatch.setitem(__import__("sys").modules, "pyiqa", None)
    with refuses(MissingLibraryError, "dpdmd-pipeline[iqa]"):
        Pyiqa("topiq_nr", tmp_path, passes)


def test_timm_builds_without_weights_only_inside_the_context():
    import timm

    before = timm.create_model
    with backbones_of_checkpoints(), hub_folder("/nowhere"):
        model = timm.create_model("resnet18", pretrained=True, features_only=True)
        assert sum(value.numel() for value in model.parameters()) > 1e7
    assert timm.create_model is before
