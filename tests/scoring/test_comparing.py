"""Figures of distributions, against a reference."""

import pytest
import torch
from PIL import Image
from tests.scoring.corners import FEATURES, MOMENTS, Corners, make_sets

from dpdmd_pipeline.metrics.distribution import frechet_influence, kernel_influence
from dpdmd_pipeline.metrics.summary import ratio_interval
from dpdmd_pipeline.scoring.score import score
from dpdmd_pipeline.scoring.scores import Reference
from dpdmd_pipeline.scoring.sets import FileSet


def test_the_same_distribution_is_near_and_another_far(settings):
    reference = Reference(make_sets(30, 6, seed=0))
    near, far = (
        score(sets, [MOMENTS, FEATURES], settings, reference).figures
        for sets in (make_sets(30, 6, seed=1), make_sets(30, 6, seed=2, low=150))
    )
    assert set(near) == {
        *(f"distribution.inception.{name}" for name in ("fid", "kid")),
        *(f"distribution.dino_v2.{name}" for name in ("precision", "recall", "density", "coverage")),
    }
    for name in ("fid", "kid"):
        assert near[f"distribution.inception.{name}"]["value"] < 0.2 * far[f"distribution.inception.{name}"]["value"]
        for figure in (near[f"distribution.inception.{name}"], far[f"distribution.inception.{name}"]):
            assert figure["low"] < figure["value"] < figure["high"]
    assert near["distribution.inception.kid"]["n"]["subset"] == 180
    for name in ("recall", "coverage"):
        figures = near[f"distribution.dino_v2.{name}"], far[f"distribution.dino_v2.{name}"]
        assert figures[0]["low"] > figures[1]["high"]
        assert figures[0]["n"] == {"prompts": 30, "pictures": 180, "reference_pictures": 180, "compared": 180}


def test_fid_and_kid_have_the_intervals_of_their_own_influence(settings):
    ours, theirs = make_sets(20, 6, seed=1, low=40), make_sets(30, 5, seed=0)
    figures = score(ours, [MOMENTS], settings, Reference(theirs)).figures
    fake, real = (torch.cat([Corners()(one.load().images) for one in sets]) for sets in (ours, theirs))
    owners = torch.arange(20).repeat_interleave(6)
    for name, influence in (("fid", frechet_influence), ("kid", kernel_influence)):
        figure = figures[f"distribution.inception.{name}"]
        expected = ratio_interval(figure["value"] + influence(real, fake), owners, settings.seed)
        assert (figure["low"], figure["high"]) == pytest.approx((expected["low"], expected["high"]), rel=1e-6)
        assert expected["low"] > 0


def test_fid_s_interval_ends_at_zero_and_its_failure_costs_no_figure(settings, monkeypatch):
    reference, alike = Reference(make_sets(8, 4, seed=0)), make_sets(8, 4, seed=1)
    figures = score(alike, [MOMENTS], settings, reference).figures
    assert figures["distribution.inception.fid"]["low"] >= 0 > figures["distribution.inception.kid"]["low"]

    def breaks_down(real, fake):
        raise torch.linalg.LinAlgError("failed to converge")

    monkeypatch.setattr("dpdmd_pipeline.metrics.distribution.frechet_influence", breaks_down)
    without = score(alike, [MOMENTS], settings, reference).figures
    fid = without["distribution.inception.fid"]
    assert fid == {**figures["distribution.inception.fid"], "low": None, "high": None}
    assert without["distribution.inception.kid"] == figures["distribution.inception.kid"]


def test_too_few_pictures_for_fid_still_give_kid(settings):
    scores = score(make_sets(2, 4, seed=0), [MOMENTS], settings, Reference(make_sets(2, 4, seed=1)))
    assert list(scores.figures) == ["distribution.inception.kid"]
    assert all(number in scores.missing["distribution.inception.fid"] for number in ("12", "8 against 8"))


def test_real_pictures_of_any_size_are_all_used(settings, tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        Image.new("RGB", (4 + number, 5), (20 * number, 9, 200 - number)).save(file)
    real = Reference([FileSet("real", "", tuple(files))])
    scores = score(make_sets(4, 3, seed=0), [FEATURES], settings, real)
    assert not scores.faults and scores.figures["distribution.dino_v2.coverage"]["n"]["compared"] == 12
