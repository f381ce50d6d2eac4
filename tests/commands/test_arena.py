"""The page in a real browser, driven by keys as a person would."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from tests.commands.browser import needs_browser
from torchvision.transforms.functional import to_pil_image

from dpdmd_pipeline.commands.arena import main
from dpdmd_pipeline.commands.score import main as score
from dpdmd_pipeline.scoring.human import load_results
from dpdmd_pipeline.shapes.world import NUM_MODES, caption, gallery


@pytest.fixture
def page(tmp_path):
    """A page about two prompts: ours against a collapsed model."""
    for prompt in range(2):
        for name, modes in (("ours", (3, 20, 41, 70)), ("dmd", (5, 5, 5, 29))):
            folder = tmp_path / name / caption(prompt)
            folder.mkdir(parents=True)
            for seed, mode in enumerate(modes):
                to_pil_image(gallery()[prompt * NUM_MODES + mode]).save(folder / f"{seed}.png")
    out = tmp_path / "arena.html"
    main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", str(out), "--singles", "1", "--sets", "4"])
    return out


@pytest.fixture
def page_of_odd_names(page):
    """A page about folders, and of a prompt, whose names are no UTF-8."""
    odd = [page.parent / os.fsdecode(name + b"\xe9") for name in (b"ours", b"dmd")]
    for name, folder in zip(("ours", "dmd"), odd, strict=True):
        (page.parent / name).rename(folder)
        (folder / caption(0)).rename(folder / os.fsdecode("ein Café ".encode() + b"\xe9"))
    main([*map(str, odd), "--out", str(page), "--singles", "1", "--sets", "4"])
    return page


@needs_browser
def test_in_a_browser_names_that_are_no_utf_8_are_shown_and_saved(launch, page_of_odd_names, tmp_path):
    browser = launch()
    begin(browser, page_of_odd_names, "p1")
    shown_prompts = set()
    for _ in range(4):
        shown_prompts.add(browser.look("document.getElementById('prompt').textContent"))
        browser.press("ArrowLeft")
    assert len(shown_prompts) == 2 and any(text.startswith("ein Café ") for text in shown_prompts)
    (tmp_path / "results.json").write_text(browser.look("JSON.stringify(results())"))
    (result,) = load_results([tmp_path / "results.json"])
    assert result["a"] == os.fsdecode(os.fsencode(tmp_path) + b"/ours\xe9")
    assert len({answer["prompt"] for answer in result["answers"]}) == 2


def begin(browser, page, who):
    browser.open(page)
    browser.look(f"participant.value = {who!r}; who.requestSubmit()")


def shown(browser):
    return browser.look("count.textContent")


@needs_browser
def test_in_a_browser_a_person_answers_by_keys_goes_on_after_a_break_and_saves(launch, page, tmp_path, capsys):
    browser = launch()
    begin(browser, page, "p1")
    assert browser.look("total.textContent") == "are 4 questions"
    assert shown(browser) == "1 of 4" and browser.look("getComputedStyle(start).display") == "none"
    order = browser.look("order.map(({index, left}) => [page.questions[index].id, left])")
    assert browser.look("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    chosen = "[...document.querySelectorAll('.chosen')].map(side => side.id)"
    assert browser.look(chosen) == []
    browser.press("ArrowLeft")
    browser.press(" ")
    browser.press("Backspace")
    assert shown(browser) == "2 of 4" and browser.look(chosen) == []
    browser.press("Backspace")
    assert browser.look(chosen) == ["left"]
    browser.press("ArrowLeft")
    browser.press("ArrowRight")  # changes the answer

    browser = launch()
    begin(browser, page, "p1")
    assert shown(browser) == "3 of 4"
    assert browser.look("order.map(({index, left}) => [page.questions[index].id, left])") == order
    browser.press("ArrowLeft")
    browser.press("ArrowLeft")
    assert browser.look("getComputedStyle(end).display") != "none"

    result = browser.look("results()")
    given = {answer["id"]: answer["choice"] for answer in result["answers"]}
    sides = dict(order)
    other = {"a": "b", "b": "a"}
    expected = [sides[name] if number != 1 else other[sides[name]] for number, (name, _) in enumerate(order)]
    assert [given[name] for name, _ in order] == expected
    assert result["participant"] == "p1" and result["a"].endswith("ours")
    (tmp_path / "results.json").write_text(json.dumps(result))
    score([str(tmp_path / "results.json"), "--by", "human"])
    assert capsys.readouterr().out.count("2 answers, 2 prompts") == 2  # of each kind


@needs_browser
def test_in_a_browser_the_saved_file_is_what_was_answered_and_people_see_different_orders(launch, page, tmp_path):
    browser = launch()
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path / "saved"))
    orders = []
    for person in range(6):
        begin(browser, page, f"p{person}")
        orders.append(browser.look("JSON.stringify(order)"))
        browser.press("ArrowLeft")
    assert len(set(orders)) > 3
    browser.look("savenow.click()")
    browser.wait_for(lambda: any(path.stat().st_size for path in (tmp_path / "saved").glob("*.json")))
    assert (
        json.loads(next((tmp_path / "saved").glob("*.json")).read_text())["answers"]
        == browser.look("results()")["answers"]
    )


def test_the_command_says_what_it_has_written(page, capsys):
    assert page.stat().st_size < 100_000
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page), "--singles", "2", "--sets", "0"])
    told = capsys.readouterr().out
    assert told.startswith(f"{page}: 4 questions about 2 prompts, ") and re.fullmatch(r".*, [1-9]\d* kB\n", told)


def test_stray_files_and_ids_without_a_text_are_told(page, capsys):
    for side in ("ours", "dmd"):
        (page.parent / side / caption(0)).rename(page.parent / side / "00000")
    (page.parent / "dmd" / "notes.txt").touch()
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page)])
    written, strays, ids = capsys.readouterr().out.splitlines()
    assert written.startswith(str(page))
    assert strays == f"left out of {page.parent / 'dmd'}, since no picture that is read: notes.txt"
    assert ids == "1 of 2 prompts has no text: people are shown its id (00000): give the texts with --prompts"


def test_a_picture_that_one_side_lacks_shifts_no_pair_and_is_told(page, capsys):
    ours, dmd = page.parent / "ours", page.parent / "dmd"
    (ours / caption(0) / "0.png").unlink()
    capsys.readouterr()
    main([str(ours), str(dmd), "--out", str(page), "--singles", "3", "--sets", "0"])
    told = capsys.readouterr().out.splitlines()[1:]
    assert told == [f"left out, since the other side has none of that name: {dmd / caption(0) / '0.png'}"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--sets", "1"], "sets 0 or at least 2"),
        (["--sets", "0", "--singles", "0"], "asks nothing"),
        (["--side", "2"], "at least 16 pixels"),
        (["--out", "nowhere/x.html"], "there is no folder"),
        (["--out", "."], r"--out \. is a folder: name the page in it, as in arena.html"),
        ([], "is no folder of pictures"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, told, tmp_path):
    given = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "x.html"), *arguments]
    with pytest.raises((ValueError, OSError), match=told):
        main(given)


def test_one_question_about_one_prompt_is_told_in_the_singular(page, capsys):
    for side in ("ours", "dmd"):
        shutil.rmtree(page.parent / side / caption(1))
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page), "--singles", "1", "--sets", "0"])
    assert ": 1 question about 1 prompt, " in capsys.readouterr().out


def test_a_folder_is_not_compared_with_itself_under_whatever_name(page, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for other in (tmp_path / "ours", tmp_path / "ours" / ".." / "ours", tmp_path / "link"):
        with pytest.raises(ValueError, match="are one folder: give the pictures of two models"):
            main([str(tmp_path / "ours"), str(other), "--out", str(page)])


def test_a_page_that_may_not_be_written_is_refused_before_any_picture_is_read(page, tmp_path, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.scoring.folders.find_pictures", lambda *_: pytest.fail("read before refused"))
    with pytest.raises(OSError, match=r"^--out /sys/x.html: nothing can be written in /sys .*: make it writable, or"):
        main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", "/sys/x.html"])


def test_a_folder_to_write_to_is_refused_before_any_picture_is_read(page, tmp_path, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.scoring.folders.find_pictures", lambda *_: pytest.fail("read before refused"))
    with pytest.raises(OSError, match="ours is a folder: name the page in it, as in .*ours/arena.html"):
        main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", str(tmp_path / "ours")])
