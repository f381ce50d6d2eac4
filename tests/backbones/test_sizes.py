"""The spelling of picture sizes, and those that are refused."""

import pytest
from pydantic import ValidationError
from tests.pipelines.conftest import BACKBONE, backbone_options
from tests.raising import refuses

from dpdmd_pipeline.backbones.sizes import MOST, check_divides, sizes_of
from dpdmd_pipeline.backbones.student_header import StudentHeader

SIZES = [[1024, 1024], [832, 1216]]


@pytest.mark.parametrize(
    "given, kept", [(32, 32), ([[32, 32]], 32), ([[32, 64]], [[32, 64]]), ([(1024, 1024), (832, 1216)], SIZES)]
)
def test_each_list_of_sizes_has_one_spelling(given, kept):
    options = backbone_options(resolution=given)
    assert options.resolution == kept
    assert options.model_dump(mode="json") == {**BACKBONE, "resolution": kept}  # what identities and headers hold


def test_sizes_are_heights_and_widths_in_order():
    assert sizes_of(32) == [(32, 32)] and sizes_of(SIZES) == [(1024, 1024), (832, 1216)]


@pytest.mark.parametrize(
    "resolution, facts",
    [
        ([], ["0", f"1 to {MOST}"]),
        ([[32, 64], [32, 32], [32, 64]], ["32 x 64", "twice"]),
        ([[8, 8 * side] for side in range(1, MOST + 2)], [str(MOST + 1), f"1 to {MOST}"]),
        ([32, 64], ["[32, 64]", "[height, width]"]),
        ([[32]], ["[[32]]", "[height, width]"]),
        ([[0, 32]], ["[[0, 32]]", "1 to"]),
        ([[32, 2**20]], [str(2**20), "1 to"]),
        ([[True, 32]], ["True"]),
        ("32", ["'32'"]),
        (32.0, ["32.0"]),
        (None, ["None"]),
    ],
)
def test_impossible_sizes_are_refused_in_options_and_headers(resolution, facts):
    with refuses(ValidationError, "resolution", *facts):
        backbone_options(resolution=resolution)
    if resolution is not None:  # in a header it is unknown
        with refuses(ValueError, "dpdmd.resolution", *facts[1:]):
            StudentHeader("sd3", [1.0, 0.0], resolution=resolution)


@pytest.mark.parametrize(
    "size, nearest", [((30, 36), "32 x 32"), ((1, 2000), "8 x 96"), ((97, 32), "96 x 32"), ((104, 8), "96 x 8")]
)
def test_the_nearest_size_that_patches_divide_is_named(size, nearest):
    with refuses(ValueError, "sample.size", f"{size[0]} x {size[1]}", "multiples of 8", nearest):
        check_divides("sample.size", size, 8, most=100)
    check_divides("sample.size", tuple(map(int, nearest.split(" x "))), 8, most=100)
