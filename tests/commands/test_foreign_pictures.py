"""Scores of pictures with known contents from another program."""

from __future__ import annotations

import json

import pytest
from tests.commands.browser import needs_browser
from tests.commands.cli import score as main

from dpdmd_pipeline.shapes.world import BACKGROUNDS, COLOURS, LEGAL, NUM_MODES, POSITIONS, RADII, RESOLUTION, SHAPES

MODES = (3, 20, 41, 60, 22, 71)
BY = "quality.shapes,diversity.shapes,diversity.pixels,diversity.clip_shapes,alignment.clip_shapes"


def css(colour):
    return "rgb({:.0f} {:.0f} {:.0f})".format(*(255 * value for value in colour))


def drawing(index):
    """Legal picture `index` as SVG, for a browser to draw."""
    colour, shape, position, radius, background = LEGAL[index]
    (row, column), size = POSITIONS[position], RADII[radius]
    side = 0.88 * size
    figure = {
        "circle": f'<circle cx="{column}" cy="{row}" r="{size}"/>',
        "square": f'<rect x="{column - side}" y="{row - side}" width="{2 * side}" height="{2 * side}"/>',
        "triangle": '<polygon points="{},{} {},{} {},{}"/>'.format(
            *(column, row - size),
            *(column - 0.62 * 1.85 * size, row + 0.85 * size),
            *(column + 0.62 * 1.85 * size, row + 0.85 * size),
        ),
    }[SHAPES[shape]]
    ground, fill = (
        css(list(table.values())[number]) for table, number in ((BACKGROUNDS, background), (COLOURS, colour))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{RESOLUTION}" height="{RESOLUTION}" '
        f'style="position:fixed;left:0;top:0;background:{ground}" fill="{fill}">{figure}</svg>'
    )


@pytest.fixture
def drawn(launch, tmp_path):
    """Folder of a browser's screenshots: several modes, one mode, and pictures of another prompt."""
    browser = launch()
    clip = {"x": 0, "y": 0, "width": RESOLUTION, "height": RESOLUTION, "scale": 1}
    contents = {
        "a red circle": [0 * NUM_MODES + mode for mode in MODES],
        "one yellow square": [10 * NUM_MODES + mode for mode in MODES],
        "a blue triangle": [8 * NUM_MODES + MODES[0]] * len(MODES),
        "a green circle": [5 * NUM_MODES + mode for mode in MODES],  # pictures of a green triangle
    }
    for text, pictures in contents.items():
        folder = tmp_path / "drawn" / text
        folder.mkdir(parents=True)
        for seed, index in enumerate(pictures):
            browser.look(f"document.body.innerHTML = {drawing(index)!r}")
            kind = ("png", "webp")[seed % 2]
            (folder / f"{seed}.{kind}").write_bytes(browser.picture(clip=clip, format=kind, quality=100))
    return tmp_path / "drawn"


@needs_browser
def test_in_a_browser_drawn_pictures_get_the_scores_of_their_contents(drawn, tmp_path, capsys):
    main([str(drawn), "--by", BY, "--json", str(tmp_path / "scores.json")])
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["pictures"] == 24 and not record["faults"] and not record["missing"]
    of = record["per_prompt"]
    assert set(of["quality.shapes.valid"].values()) == {1.0}
    assert of["quality.shapes.aligned"] == {
        "a red circle": 1.0,
        "one yellow square": 1.0,
        "a blue triangle": 1.0,
        "a green circle": 0.0,
    }
    modes = of["diversity.shapes.effective_modes"]
    assert modes["a blue triangle"] == pytest.approx(1) and modes["a red circle"] > 6
    for name in ("diversity.pixels.mean_distance", "diversity.clip_shapes.one_minus_cosine"):
        assert of[name]["a blue triangle"] < 0.1 * of[name]["a red circle"]
    right, wrong = (of["alignment.clip_shapes.score"][text] for text in ("a red circle", "a green circle"))
    assert right > wrong
    assert "quality.shapes.aligned" in capsys.readouterr().out
