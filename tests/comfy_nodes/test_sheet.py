"""Sheets of labelled pictures, and the number for a batch's diversity."""

import pytest
import torch
from comfy_nodes.sheet import TILE, make_sheet, mean_distance, shrink
from tests.raising import refuses


def test_a_sheet_holds_every_picture_where_its_number_says():
    tiles = torch.arange(6).view(6, 1, 1, 1).expand(6, 40, 60, 3) / 10
    sheet = make_sheet(tiles, [f"#{index}" for index in range(6)], columns=3)
    height = (sheet.shape[1]) // 2
    assert sheet.shape == (1, 2 * height, 3 * 60, 3) and height > 40
    for index in range(6):
        top, left = index // 3 * height, index % 3 * 60
        torch.testing.assert_close(sheet[0, top : top + 40, left : left + 60], tiles[index], atol=1 / 255, rtol=0)
        label = sheet[0, top + 40 : top + height, left : left + 60]
        assert 0 < (label < 0.5).float().mean() < 0.5  # dark letters on white


def test_without_columns_a_sheet_is_nearly_square():
    assert make_sheet(torch.zeros(5, 10, 10, 3), ["x"] * 5).shape[2] == 30


@pytest.mark.parametrize(("size", "expected"), [((64, 32), (64, 32)), ((1280, 640), (TILE, TILE // 2))])
def test_only_large_pictures_become_smaller(size, expected):
    assert shrink(torch.rand(2, *size, 3)).shape == (2, *expected, 3)


def test_the_distance_of_a_batch_is_zero_for_copies_and_that_of_noise_for_noise():
    noise = torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    assert mean_distance(noise[:1].expand(4, -1, -1, -1)) == 0
    assert mean_distance(noise) == pytest.approx(2**0.5, abs=0.01)
    assert mean_distance(100 * noise) == pytest.approx(mean_distance(noise))
    shared = noise[:1] + 0.1 * noise
    assert 0 < mean_distance(shared) < 0.2


def test_the_distance_is_the_mean_over_all_pairs():
    pictures = torch.tensor([[0.0], [3.0], [6.0]])
    assert mean_distance(pictures) == pytest.approx((3 + 6 + 3) / 3 / 6**0.5)


@pytest.mark.parametrize(
    ("latents", "facts"), [(torch.ones(1, 4), ("1 picture",)), (torch.tensor([[1.0], [torch.inf]]), ("finite",))]
)
def test_a_batch_without_a_distance_is_refused(latents, facts):
    with refuses(ValueError, *facts):
        mean_distance(latents)
