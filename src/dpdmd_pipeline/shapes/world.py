"""Draw every legal picture of the embedded world, with its attributes and captions.

A prompt determines colour and shape. Position, radius and background are *free*: the prompt does not mention them, so
that a faithful model draws all their combinations and a collapsed one only a few. All attributes are discrete, so that
the world is finite: 12 prompts x 72 modes = 864 legal pictures.
"""

import itertools
import re
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

RESOLUTION = 32
_SUPERSAMPLING = 4

COLOURS = {
    "red": (0.88, 0.14, 0.14),
    "green": (0.15, 0.68, 0.27),
    "blue": (0.13, 0.36, 0.92),
    "yellow": (0.97, 0.82, 0.12),
}
SHAPES = ("circle", "square", "triangle")
POSITIONS = tuple(itertools.product((8.0, 16.0, 24.0), repeat=2))  # centre (row, column) in pixels
RADII = (4.2, 6.4)  # pixels
BACKGROUNDS = {
    "black": (0.06, 0.06, 0.07),
    "grey": (0.50, 0.50, 0.50),
    "white": (0.97, 0.97, 0.97),
    "purple": (0.47, 0.17, 0.55),
}

# The first is the canonical caption; all have the same meaning.
CAPTION_TEMPLATES = (
    "a {colour} {shape}",
    "{colour} {shape}",
    "one {colour} {shape}",
    "a {shape} in {colour}",
    "a picture of a {colour} {shape}",
)


class Attributes(NamedTuple):
    """Contents of a picture: indices into COLOURS, SHAPES, POSITIONS, RADII and BACKGROUNDS."""

    colour: int
    shape: int
    position: int
    radius: int
    background: int


# Words for the free attributes, in the order of their indices.
FREE_WORDS = {
    "position": tuple(map(" ".join, itertools.product(("top", "middle", "bottom"), ("left", "centre", "right")))),
    "radius": ("small", "large"),
    "background": tuple(BACKGROUNDS),
}
FREE = tuple(FREE_WORDS)
FREE_COUNTS = {name: len(words) for name, words in FREE_WORDS.items()}
NUM_PROMPTS = len(COLOURS) * len(SHAPES)
NUM_MODES = len(POSITIONS) * len(RADII) * len(BACKGROUNDS)

# Picture i shows prompt i // NUM_MODES in mode i % NUM_MODES.
_COUNTS = (len(COLOURS), len(SHAPES), *FREE_COUNTS.values())
LEGAL = tuple(Attributes(*indices) for indices in itertools.product(*map(range, _COUNTS)))


def caption(prompt_index: int, template: str = CAPTION_TEMPLATES[0]) -> str:
    """The caption of prompt 0..NUM_PROMPTS-1, such as "a red circle"."""
    colour, shape = divmod(prompt_index, len(SHAPES))
    return template.format(colour=list(COLOURS)[colour], shape=SHAPES[shape])


def captions() -> list[str]:
    """Every caption of the world, canonical ones first: NUM_PROMPTS x len(CAPTION_TEMPLATES)."""
    return [caption(index, template) for template in CAPTION_TEMPLATES for index in range(NUM_PROMPTS)]


def prompt_index(prompt: str) -> int:
    """Index of the world's prompt with the meaning of a text.

    Raises:
        ValueError: unless the text names exactly one colour and one shape of the world.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    colours = {word for word in words if word in COLOURS}
    shapes = {word for word in words if word in SHAPES}
    if len(colours) != 1 or len(shapes) != 1:
        raise ValueError(
            f"prompt {prompt!r} is not of the shapes world: name one colour of {', '.join(COLOURS)} "
            f"and one shape of {', '.join(SHAPES)}"
        )
    return list(COLOURS).index(colours.pop()) * len(SHAPES) + SHAPES.index(shapes.pop())


def _shape_mask(shape: str, centre: tuple[float, float], radius: float) -> Tensor:
    """Coverage of each pixel by the shape, [RESOLUTION, RESOLUTION] in [0, 1]."""
    grid = (torch.arange(RESOLUTION * _SUPERSAMPLING) + 0.5) / _SUPERSAMPLING
    rows, columns = (grid - centre[0])[:, None], (grid - centre[1])[None, :]
    if shape == "circle":
        inside = rows**2 + columns**2 < radius**2
    elif shape == "square":
        side = 0.88 * radius  # nearly the circle's area, so that size does not reveal the shape
        inside = (rows.abs() < side) & (columns.abs() < side)
    else:
        height = rows + radius  # apex at the top, base `radius * 0.85` below the centre
        inside = (height > 0) & (rows < 0.85 * radius) & (columns.abs() < 0.62 * height)
    return F.avg_pool2d(inside.float()[None, None], _SUPERSAMPLING)[0, 0]


def render(attributes: Attributes) -> Tensor:
    """The picture with these attributes, [3, RESOLUTION, RESOLUTION] in [0, 1]."""
    mask = _shape_mask(SHAPES[attributes.shape], POSITIONS[attributes.position], RADII[attributes.radius])
    foreground = torch.tensor(list(COLOURS.values())[attributes.colour])[:, None, None]
    background = torch.tensor(list(BACKGROUNDS.values())[attributes.background])[:, None, None]
    return mask * foreground + (1 - mask) * background


@cache
def gallery() -> Tensor:
    """All legal pictures in the order of LEGAL, [NUM_PROMPTS * NUM_MODES, 3, RESOLUTION, RESOLUTION]."""
    return torch.stack([render(attributes) for attributes in LEGAL])
