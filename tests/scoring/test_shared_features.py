"""Metrics of the same network run it once."""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpdmd_pipeline.metrics.passes import Passes
from dpdmd_pipeline.scoring import published
from dpdmd_pipeline.scoring.preset import Settings
from dpdmd_pipeline.scoring.presets import choose
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import TensorSet


@pytest.fixture
def seen(monkeypatch):
    """Pictures that went through any network."""
    found = []
    before = Passes.run

    def run(self, network, images):
        if not torch.is_tensor(images) and not isinstance(images[0], str):
            found.extend(images)
        return before(self, network, images)

    monkeypatch.setattr(Passes, "run", run)
    return found


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


def test_shared_features_give_the_same_bits_with_half_the_passes(settings, seen, tmp_path):
    presets, sets, reference = choose(PRESETS), make_sets(0), make_sets(1)
    apart = score(sets, presets, settings, Reference(reference))
    assert not apart.missing
    passed = len(seen)
    seen.clear()
    shared = score(sets, presets, replace(settings, features=tmp_path / "features"), Reference(reference))
    assert shared == apart
    # of 12 pictures and 12 of the reference: diversity looks at both in two spaces, alignment and distribution at none
    assert (passed, len(seen)) == (12 * 4 + 12 * 3, 12 * 2 + 12 * 2)


def test_what_one_process_has_kept_no_other_computes(settings, tmp_path):
    presets, sets = choose("diversity.clip"), make_sets(0)
    settings = replace(settings, features=tmp_path / "features")

    def kept():
        return {file.name: file.stat().st_mtime_ns for file in (tmp_path / "features").iterdir()}

    alone, before = score(sets, presets, settings), kept()
    assert len(before) == 3
    assert score(sets, presets, replace(settings, processes=2)) == alone and kept() == before


def test_other_weights_and_other_outputs_are_not_taken_for_known(settings, weights, tmp_path, seen):
    settings = replace(settings, features=tmp_path / "features")
    sets, clip = make_sets(0), choose("diversity.clip")
    first = score(sets, clip, settings)
    model = weights / "clip-vit-large-patch14-openclip" / "open_clip_model.safetensors"
    state = load_file(model)
    state["visual.proj"] = state["visual.proj"].flip(1) + 0.5
    save_file(state, model, {"format": "pt"})
    seen.clear()
    second = score(sets, clip, settings)
    assert len(seen) == 12 and second.figures != first.figures
    one, other = (
        settings.shared(lambda images: torch.ones(len(images), 1), published.CLIP_L, output) for output in "ab"
    )
    images = sets[0].load().images
    one(images)
    other.embed = lambda images: torch.zeros(len(images), 1)
    assert not other(images).any()


def test_identical_pictures_in_two_processes_cost_no_metric(settings, tmp_path):
    (one,) = make_sets(0)[:1]
    sets = [TensorSet(f"p{number}", one.text, one.images) for number in range(60)]
    together = replace(settings, processes=2, features=tmp_path / "features")
    scores = score(sets, choose("diversity.clip"), together)
    assert not scores.missing and scores.figures["diversity.clip.vendi"]["n"]["prompts"] == 60
    assert len(list((tmp_path / "features").iterdir())) == 1


def test_a_disk_that_takes_no_file_costs_no_metric(settings, tmp_path, caplog):
    (tmp_path / "features").touch()  # a file in the folder's place
    presets, sets = choose("diversity.clip,alignment.clip_score"), make_sets(0)
    assert score(sets, presets, replace(settings, features=tmp_path / "features")) == score(sets, presets, settings)
    assert caplog.text.count("features cannot be kept in") == 2  # once a metric
