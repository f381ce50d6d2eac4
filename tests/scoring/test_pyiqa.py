"""pyiqa's metrics through the presets of `score`, on random weights in the published kinds of file.

pyiqa's licence is non-commercial, so the project's environment lacks it: CI runs these tests in another environment
(.ci/extras), where a missing pyiqa is a failure.
"""

import hashlib
import importlib.util
import os

import pytest
import torch
from torch import nn

from dpdmd_pipeline.metrics.errors import UnavailableError
from dpdmd_pipeline.metrics.libraries import hub_folder
from dpdmd_pipeline.metrics.quality import Pyiqa, backbones_of_checkpoints
from dpdmd_pipeline.scoring import published as w
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.presets import choose

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("pyiqa") is None and "IQA_REQUIRED" not in os.environ, reason="pyiqa is not installed"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folder of all weights; pyiqa reads it at import."""
    folder = tmp_path_factory.mktemp("weights")
    with hub_folder(folder):
        import pyiqa  # noqa: F401
    return folder


def save(weights, root, content):
    file = root / weights.folder / str(weights.files[0])
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, file)
    return file


def random_clip(root, monkeypatch):
    """Save a CLIP RN50 of open_clip in OpenAI's kind of file, and register its SHA-256 as its address."""
    import open_clip
    from pyiqa.archs import clip_model

    archive = nn.Module()
    for name, value in open_clip.create_model("RN50", force_quick_gelu=True).state_dict().items():
        *path, last = name.split(".")
        owner = archive
        for part in path:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.register_buffer(last, value)
    file = root / w.CLIP_RN50.folder / str(w.CLIP_RN50.files[0])
    file.parent.mkdir(parents=True)
    torch.jit.save(torch.jit.script(archive), file)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    monkeypatch.setitem(clip_model._MODELS, "RN50", f"https://example.invalid/{digest}/{file.name}")


@pytest.mark.parametrize(
    ("metric", "name", "weights", "wrapped"),
    [
        ("quality.maniqa_pipal", "maniqa-pipal", w.MANIQA, False),
        ("quality.topiq", "topiq_nr", w.TOPIQ, True),
        ("quality.clipiqa_plus", "clipiqa+", w.CLIPIQA_PLUS, False),
    ],
)
def test_a_score_is_pyiqa_s_own_of_the_same_file(metric, name, weights, wrapped, root, photos, passes, monkeypatch):
    from pyiqa.archs import build_network
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    from torchvision.transforms.functional import to_tensor

    torch.manual_seed(0)
    monkeypatch.setitem(DEFAULT_CONFIGS["maniqa-pipal"]["metric_opts"], "test_sample", 2)  # not 20 crops: time
    photos = [photo.resize((256, 256)) for photo in photos[:2]]
    if weights is w.CLIPIQA_PLUS:
        random_clip(root, monkeypatch)
    with hub_folder(root), backbones_of_checkpoints():
        own = build_network({**DEFAULT_CONFIGS[name]["metric_opts"], "pretrained": False}).eval()
    state = own.prompt_learner.ctx.data if weights is w.CLIPIQA_PLUS else own.state_dict()
    save(weights, root, {"params": state} if wrapped else state)
    (preset,) = choose(metric)
    measured = preset.make(Settings(root, passes, processes=1, seed=0))("", photos)
    expected = []
    for photo in photos:
        torch.manual_seed(0)
        with torch.no_grad():
            expected.append(own(to_tensor(photo)[None]).item())
    assert expected[0] != expected[1]
    assert measured.values["score"] == pytest.approx(sum(expected) / 2, rel=1e-5)


def test_missing_weights_are_never_random(root, passes):
    with pytest.raises(UnavailableError, match="https?://"):
        Pyiqa("topiq_iaa", root, passes)
