import math

import pytest
import torch
from PIL import Image

from dpdmd_pipeline.metrics.diversity import pairwise_distance
from dpdmd_pipeline.metrics.measures import PairDiversity, pixel_distances


def test_pixel_distance_is_that_of_the_embedded_world_s_metric():
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    distance = pixel_distances(images).mean().item()
    assert math.isclose(distance, pairwise_distance(pixels / 255), rel_tol=1e-6)


def test_pixel_distances_are_exact_and_in_the_order_of_their_pairs(monkeypatch):
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    images = [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in pixels]
    flat, whole = pixels.flatten(1).long(), pixel_distances(images)
    pairs = [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
    sums = torch.tensor([(flat[i] - flat[j]).square().sum() for i, j in pairs]).double()
    assert torch.equal(whole, (sums / flat.shape[1]).sqrt() / 255)
    monkeypatch.setattr("dpdmd_pipeline.metrics.measures._BLOCK", 7)
    assert torch.equal(pixel_distances(images), whole)


@pytest.mark.parametrize(
    ("distances", "value", "unusable"),
    [
        ([0.5, math.nan, math.nan, 0.1, 0.2, math.nan], 0.8 / 3, (2,)),  # all pairs of picture 2
        ([0.5, 0.3, math.nan, 0.1, 0.2, 0.7], 0.1, (1, 2)),  # one pair: the picture at fault is unknown
        ([math.nan] * 6, None, (0, 1, 2, 3)),
    ],
)
def test_pictures_without_finite_distances_are_left_out_and_listed(distances, value, unusable):
    measure = PairDiversity(lambda images: torch.tensor(distances))  # (1, 0), (2, 0), (2, 1), (3, 0), ...
    measured = measure("", [None] * 4)
    assert measured.unusable == unusable
    assert (
        measured.values == {} if value is None else math.isclose(measured.values["mean_distance"], value, rel_tol=1e-6)
    )
