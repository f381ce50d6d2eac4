"""The world is finite, its pictures are distinct, and its captions are unambiguous."""

from collections import Counter
from itertools import product

import pytest
import torch
from tests.raising import refuses

from dpdmd_pipeline.shapes.world import (
    BACKGROUNDS,
    CAPTION_TEMPLATES,
    COLOURS,
    FREE,
    FREE_COUNTS,
    LEGAL,
    NUM_MODES,
    NUM_PROMPTS,
    POSITIONS,
    RADII,
    RESOLUTION,
    SHAPES,
    caption,
    captions,
    gallery,
    prompt_index,
    render,
)


def foreground(index: int) -> torch.Tensor:
    """Share of the object's colour in each pixel of a legal picture, [RESOLUTION, RESOLUTION]."""
    attributes = LEGAL[index]
    background = torch.tensor(list(BACKGROUNDS.values())[attributes.background])[:, None, None]
    difference = torch.tensor(list(COLOURS.values())[attributes.colour])[:, None, None] - background
    return ((gallery()[index] - background) * difference).sum(0) / difference.square().sum()


def test_the_864_legal_pictures_are_distinct_and_in_range():
    pictures = gallery()
    assert pictures.shape == (864, 3, RESOLUTION, RESOLUTION)
    assert pictures.min() >= 0 and pictures.max() <= 1
    distance = torch.cdist(pictures.flatten(1).double(), pictures.flatten(1).double())
    distance.fill_diagonal_(torch.inf)
    assert distance.min() / pictures[0].numel() ** 0.5 > 0.015  # RMS, of values in [0, 1]; measured .0158


def test_picture_i_shows_prompt_i_div_72_in_mode_i_mod_72():
    assert (NUM_PROMPTS, NUM_MODES, len(LEGAL)) == (12, 72, 864)
    for index in range(0, 864, 29):
        attributes = LEGAL[index]
        assert torch.equal(gallery()[index], render(attributes))
        colour, shape = divmod(index // NUM_MODES, len(SHAPES))
        assert (attributes.colour, attributes.shape) == (colour, shape)
        assert caption(index // NUM_MODES) == f"a {list(COLOURS)[colour]} {SHAPES[shape]}"
    modes = [tuple(getattr(attributes, name) for name in FREE) for attributes in LEGAL]
    assert all(modes[index] == modes[index % NUM_MODES] for index in range(864))


def test_free_attributes_are_uniform_and_independent_within_every_prompt():
    every_combination = set(product(*(range(FREE_COUNTS[name]) for name in FREE)))
    assert len(every_combination) == NUM_MODES
    for prompt in range(NUM_PROMPTS):
        pictures = LEGAL[prompt * NUM_MODES : (prompt + 1) * NUM_MODES]
        counts = Counter(tuple(getattr(attributes, name) for name in FREE) for attributes in pictures)
        assert set(counts) == every_combination and set(counts.values()) == {1}


def test_every_object_is_inside_the_picture_at_its_position():
    middle = POSITIONS.index((16.0, 16.0))
    for index in range(0, 864, 7):
        share = foreground(index)
        assert share.sum() == pytest.approx(
            foreground(LEGAL.index(LEGAL[index]._replace(position=middle))).sum().item(), rel=1e-4
        )
        attributes, grid = LEGAL[index], torch.arange(RESOLUTION) + 0.5
        centroid = [((share.sum(1 - axis) * grid).sum() / share.sum()).item() for axis in (0, 1)]
        centre = list(POSITIONS[attributes.position])
        if SHAPES[attributes.shape] == "triangle":  # two thirds of its height, 1.85 radii, below the apex
            centre[0] += (1.85 * 2 / 3 - 1) * RADII[attributes.radius]
        assert centroid == pytest.approx(centre, abs=0.06)


def test_circle_and_square_have_the_same_size():
    areas = {
        (attributes.shape, attributes.radius): foreground(index).sum().item()
        for index, attributes in enumerate(LEGAL[:216])
    }
    for radius in range(2):
        assert areas[SHAPES.index("square"), radius] == pytest.approx(areas[SHAPES.index("circle"), radius], rel=0.05)
        assert areas[SHAPES.index("circle"), 1] > 2 * areas[SHAPES.index("circle"), 0]


def test_every_caption_means_its_prompt():
    assert len(set(captions())) == NUM_PROMPTS * len(CAPTION_TEMPLATES)
    assert captions()[:NUM_PROMPTS] == [caption(index) for index in range(NUM_PROMPTS)]
    for template in CAPTION_TEMPLATES:
        for index in range(NUM_PROMPTS):
            assert prompt_index(caption(index, template)) == index


@pytest.mark.parametrize("text", ["A RED  Circle!", "circle, red", "the red circle is a circle", "red-circle"])
def test_case_order_and_punctuation_of_a_prompt_do_not_matter(text):
    assert prompt_index(text) == prompt_index("a red circle")


@pytest.mark.parametrize(
    "text", ["", "a red", "a circle", "a red and blue circle", "a red circle in a square", "reddish circles"]
)
def test_a_prompt_that_does_not_name_one_colour_and_one_shape_is_refused(text):
    with refuses(ValueError, "red, green, blue, yellow") as error:
        prompt_index(text)
    assert repr(text) in str(error.value)
