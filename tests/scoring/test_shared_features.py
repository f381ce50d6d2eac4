"""Metrics of the same network run it once."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.scoring import corners
from tests.scoring.corners import SHARED

from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.scoring import published
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.presets import choose
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet


@pytest.fixture
def passed(monkeypatch):
    """Pictures that went through a network."""
    pictures = []
    before = Passes.run

    def run(self, network, images):
        if not torch.is_tensor(images) and not isinstance(images[0], str):
            pictures.extend(images)
        return before(self, network, images)

    monkeypatch.setattr(Passes, "run", run)
    return pictures


@pytest.fixture
def weights(tmp_path, dino_v2, open_clip_folder):
    root = tmp_path / "weights"
    shutil.copytree(dino_v2, root / "dinov2-base")
    shutil.copytree(open_clip_folder, root / "clip-vit-large-patch14-openclip")
    return root


def make_sets(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (3, 4, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return [TensorSet(f"p{number}", "a red circle", images) for number, images in enumerate(pixels)]


@pytest.fixture
def settings(weights, passes):
    return Settings(weights=weights, passes=passes, processes=1, seed=0)


PRESETS = "diversity.clip,alignment.clip_score,diversity.dino_v2,distribution.dino_v2"


def test_shared_features_give_the_same_bits_with_half_the_passes(settings, passed, tmp_path):
    presets, sets, reference = choose(PRESETS), make_sets(0), make_sets(1)
    separate = score(sets, presets, settings, Reference(reference))
    assert not separate.missing
    count = len(passed)
    passed.clear()
    shared = score(sets, presets, replace(settings, features=tmp_path / "features"), Reference(reference))
    assert shared == separate
    # 12 pictures and 12 of the reference: only diversity runs its two networks, alignment and distribution reuse them
    assert (count, len(passed)) == (12 * 4 + 12 * 3, 12 * 2 + 12 * 2)


def test_processes_share_stored_features(settings, tmp_path):
    sets = corners.make_sets(3, 4, seed=0)
    settings = replace(settings, features=tmp_path / "features")

    def stored():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "features").iterdir()}

    alone, before = score(sets, [SHARED], settings), stored()
    assert len(before) == 3
    assert score(sets, [SHARED], replace(settings, processes=2)) == alone and stored() == before


def test_other_weights_and_other_outputs_have_features_of_their_own(settings, weights, tmp_path, passed):
    settings = replace(settings, features=tmp_path / "features")
    sets, clip = make_sets(0), choose("diversity.clip")
    first = score(sets, clip, settings)
    model = weights / "clip-vit-large-patch14-openclip" / "open_clip_model.safetensors"
    state = load_file(model)
    state["visual.proj"] = state["visual.proj"].flip(1) + 0.5
    save_file(state, model, {"format": "pt"})
    passed.clear()
    second = score(sets, clip, settings)
    assert len(passed) == 12 and second.figures != first.figures
    one, other = (
        settings.shared(lambda images: torch.ones(len(images), 1), published.CLIP_L, output) for output in "ab"
    )
    images = sets[0].load().images
    one(images)
    other.embed = lambda images: torch.zeros(len(images), 1)
    assert not other(images).any()


def test_two_processes_may_store_the_same_features(settings, tmp_path):
    (one,) = corners.make_sets(1, 4, seed=0)
    sets = [TensorSet(f"p{number}", one.text, one.images) for number in range(60)]
    together = replace(settings, processes=2, features=tmp_path / "features")
    scores = score(sets, [SHARED], together)
    assert not scores.missing and scores.figures["diversity.shared.vendi"]["n"]["prompts"] == 60
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_disk_without_space_costs_no_metric(settings, tmp_path, caplog):
    (tmp_path / "features").touch()  # a file in place of the folder
    presets, sets = choose("diversity.clip,alignment.clip_score"), make_sets(0)
    assert score(sets, presets, replace(settings, features=tmp_path / "features")) == score(sets, presets, settings)
    assert len(caplog.records) == 2  # once per metric
    assert all(str(tmp_path / "features") in record.getMessage() for record in caplog.records)
