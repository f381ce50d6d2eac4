import base64
import io
import json
import os
import re
from dataclasses import replace

import pytest
from PIL import Image
from tests.raising import refuses

from dpdmd_pipeline.scoring.arena import ArenaOptions, about_pairs, make_arena, pair_up
from dpdmd_pipeline.scoring.sets import FileSet

OPTIONS = ArenaOptions(per_prompt=2, set_size=4, side=None, seed=0)


@pytest.fixture
def sides(tmp_path):
    """Two prompts with five pictures each on both sides; the second prompt contains HTML."""

    def side(name, shift):
        sets = []
        for number, text in enumerate(("a dog", '</script><b>"&')):
            files = []
            for seed in range(5):
                files.append(tmp_path / f"{name}_{number}_{seed}.png")
                Image.new("RGB", (40, 20), (seed * 40, number * 200, shift)).save(files[-1])
            sets.append(FileSet(f"p{number}", text, tuple(files)))
        return sets

    return side("secret_a", 10), side("secret_b", 90)


def page_of(html):
    return json.loads(re.search(r"^const page = (.*);$", html, re.MULTILINE)[1])


def test_the_page_holds_every_question_with_its_pictures_and_needs_nothing_else(sides):
    html = make_arena(*sides, ("folder a", "folder b"), OPTIONS)
    page = page_of(html)
    assert [question["question"] for question in page["questions"]] == ["diversity", "quality", "quality"] * 2
    assert len({question["id"] for question in page["questions"]}) == 6
    for question in page["questions"]:
        assert len(question["a"]) == len(question["b"]) == (4 if question["question"] == "diversity" else 1)
        for key in (*question["a"], *question["b"]):
            assert page["pictures"][key].startswith("data:image/png;base64,")
    assert page["questions"][3]["prompt"] == '</script><b>"&'
    assert html.count("</script>") == 1 and not re.search(r"https?://|src=[\"'](?!data)", html)


def files(folder, *names):
    """A set of these files, which need not exist."""
    return FileSet("p", "a dog", tuple(folder / name for name in names))


def pairs(a, b):
    return [(one.name, other.name) for one, other in pair_up(a, b, ("A", "B")).pairs]


def test_pictures_of_the_same_name_are_paired_though_either_side_lacks_some(tmp_path):
    a, b = files(tmp_path / "a", "1.png", "2.png", "4.png"), files(tmp_path / "b", "0.webp", "1.webp", "2.webp")
    assert pairs(a, b) == [("1.png", "1.webp"), ("2.png", "2.webp")]
    (note,) = about_pairs([a], [b], ("A", "B"))
    assert note.endswith(f": {tmp_path}/a/4.png, {tmp_path}/b/0.webp")


def test_different_names_are_paired_by_their_numbers_if_both_sides_have_the_same(tmp_path):
    a, b = files(tmp_path, "a dog_10.png", "a dog_2.png"), files(tmp_path, "0002.png", "0010.png")
    assert pairs(a, b) == [("a dog_10.png", "0010.png"), ("a dog_2.png", "0002.png")]
    assert about_pairs([a], [b], ("A", "B")) == []


@pytest.mark.parametrize("names", [("x.png", "y.png"), ("seed8.png", "seed9.png"), ("1/r.png", "2/r.png")])
def test_names_with_nothing_in_common_are_paired_in_order_with_a_note(tmp_path, names):
    a, b = files(tmp_path, *names), files(tmp_path, "0.png", "1.png")
    assert [other for _, other in pairs(a, b)] == ["0.png", "1.png"]
    (note,) = about_pairs([a], [b], ("A", "B"))
    assert "1 prompt (p)" in note


@pytest.mark.parametrize(
    "names",
    [
        ("img_1_.png", "img_2_.png", "img_3_.png"),  # 1 may be the second there and the first here
        ("0000.png", "0001.png"),  # some are missing, and a count does not tell which
        ("x.png", "y.png"),
    ],
)
def test_pictures_of_possibly_different_seeds_are_refused_with_prompt_and_counts(tmp_path, names):
    a, b = files(tmp_path, *names), files(tmp_path, "0.png", "1.png", "2.png")
    with refuses(ValueError, "'p'", f"{len(names)} pictures in A", "3 pictures in B"):
        pair_up(a, b, ("A", "B"))


def test_a_prompt_without_pictures_on_a_side_is_refused(tmp_path):
    for sides in ((files(tmp_path), files(tmp_path, "0.png")), (files(tmp_path), files(tmp_path))):
        with pytest.raises(ValueError, match=r"'p' .*\bA\b"):
            pair_up(*sides, ("A", "B"))


def test_a_question_about_diversity_shows_the_same_seeds_on_both_sides(sides):
    a, b = sides
    a[0] = replace(
        a[0], files=tuple(file.rename(file.with_name(f"{seed}.png")) for seed, file in enumerate(a[0].files))
    )
    (b[0].files[0].parent / "b").mkdir()
    moved = [file.rename(file.parent / "b" / f"{seed}.png") for seed, file in enumerate(b[0].files)]
    b[0] = replace(b[0], files=tuple(moved[1:]))
    page = page_of(make_arena(a, b, ("a", "b"), OPTIONS))
    assert [colour(page, key)[0] for key in page["questions"][0]["a"]] == [40, 80, 120, 160]


def colour(page, key):
    return Image.open(io.BytesIO(base64.b64decode(page["pictures"][key].split(",")[1]))).getpixel((0, 0))


def test_pairs_have_the_same_seed_and_file_names_stay_out_of_the_page(sides):
    html = make_arena(*sides, ("folder a", "folder b"), OPTIONS)
    page = page_of(html)
    assert "secret" not in html
    quality = [question for question in page["questions"] if question["question"] == "quality"]
    for question in quality:
        colours = [colour(page, question[side][0]) for side in ("a", "b")]
        assert colours[0][:2] == colours[1][:2] and (colours[0][2], colours[1][2]) == (10, 90)


def test_a_page_is_reproducible_and_another_seed_gives_other_questions(sides):
    names = ("a", "b")
    pages = [page_of(make_arena(*sides, names, ArenaOptions(2, 4, None, seed))) for seed in (0, 0, 1, 2)]
    assert pages[0] == pages[1]
    assert len({page["arena"] for page in pages}) == 3
    assert len({str(page["questions"]) for page in pages}) > 1


def test_the_text_comes_from_either_side_and_two_texts_are_refused(sides):
    a, b = ([replace(one) for one in side] for side in sides)
    a[0] = replace(a[0], text="p0", no_text="a name is not a text")
    b[0] = replace(b[0], text="a red dog")
    page = page_of(make_arena(a, b, ("a", "b"), OPTIONS))
    assert {q["prompt"] for q in page["questions"] if q["id"].startswith("p0/")} == {"a red dog"}
    a[0] = replace(a[0], text="a red cat", no_text="")
    with refuses(ValueError, "'p0'", "'a red cat' in a", "'a red dog' in b"):
        make_arena(a, b, ("a", "b"), OPTIONS)


def test_a_name_outside_utf_8_is_no_obstacle(sides):
    name = os.fsdecode(b"caf\xe9")
    html = make_arena(*sides, (name, "café"), OPTIONS)
    page = page_of(html.encode().decode())
    assert (page["a"], page["b"]) == (name, "café")


def test_reduced_pictures_keep_their_shape(sides):
    page = page_of(make_arena(*sides, ("a", "b"), ArenaOptions(1, 0, 16, 0)))
    uri = next(iter(page["pictures"].values()))
    assert uri.startswith("data:image/webp") and all(q["question"] == "quality" for q in page["questions"])
    assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (16, 8)


def test_folders_that_do_not_compare_are_refused(sides, monkeypatch):
    a, b = sides
    with refuses(ValueError, "'p1'"):
        make_arena(a, b[:1], ("a", "b"), OPTIONS)
    with pytest.raises(ValueError, match=r"'p0' .*\b5 pairs.*\b9\b.*--sets"):
        make_arena(a, b, ("a", "b"), ArenaOptions(1, 9, None, 0))
    monkeypatch.setattr("dpdmd_pipeline.scoring.arena.LARGEST_PAGE_MB", 0.0005)
    with refuses(ValueError, "0.0005 MB", "--side"):
        make_arena(a, b, ("a", "b"), OPTIONS)


def test_all_unusable_pictures_are_named_at_once(sides):
    a, b = sides
    a[0].files[0].write_bytes(b"")
    b[1].files[1].write_text("no picture")
    with pytest.raises(OSError) as refused:
        make_arena(a, b, ("a", "b"), OPTIONS)
    message = str(refused.value)
    assert "2 pictures" in message and "\n" not in message
    assert "secret_a_0_0.png (empty file)" in message and "secret_b_1_1.png (not a PNG" in message
