"""The page in a real browser, used by keyboard, and the refusals of the command."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest
from tests.commands.browser import needs_browser
from tests.commands.cli import arena as main
from tests.commands.cli import score
from tests.raising import refuses
from torchvision.transforms.functional import to_pil_image

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
    """A page whose folders and one prompt have names outside UTF-8."""
    odd = [page.parent / os.fsdecode(name + b"\xe9") for name in (b"ours", b"dmd")]
    for name, folder in zip(("ours", "dmd"), odd, strict=True):
        (page.parent / name).rename(folder)
        (folder / caption(0)).rename(folder / os.fsdecode("ein Café ".encode() + b"\xe9"))
    main([*map(str, odd), "--out", str(page), "--singles", "1", "--sets", "4"])
    return page


@needs_browser
def test_in_a_browser_names_outside_utf_8_are_shown_and_saved(launch, page_of_odd_names, tmp_path):
    browser = launch()
    begin(browser, page_of_odd_names, "p1")
    shown_prompts = set()
    for _ in range(4):
        shown_prompts.add(browser.look("document.getElementById('prompt').textContent"))
        browser.press("ArrowLeft")
    assert len(shown_prompts) == 2 and any(text.startswith("ein Café ") for text in shown_prompts)
    (tmp_path / "results.json").write_text(browser.look("JSON.stringify(results())"))
    (result,) = load_results([tmp_path / "results.json"])
    assert result.a == os.fsdecode(os.fsencode(tmp_path) + b"/ours\xe9")
    assert len({answer.prompt for answer in result.answers}) == 2


def begin(browser, page, who):
    browser.open(page)
    browser.look(f"participant.value = {who!r}; who.requestSubmit()")


def shown(browser):
    return browser.look("count.textContent")


@needs_browser
def test_in_a_browser_a_person_answers_by_keyboard_with_a_break(launch, page, tmp_path, capsys):
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
    choices = {answer["id"]: answer["choice"] for answer in result["answers"]}
    sides = dict(order)
    other = {"a": "b", "b": "a"}
    expected = [sides[name] if number != 1 else other[sides[name]] for number, (name, _) in enumerate(order)]
    assert [choices[name] for name, _ in order] == expected
    assert result["participant"] == "p1" and result["a"].endswith("ours")
    (tmp_path / "results.json").write_text(json.dumps(result))
    score([str(tmp_path / "results.json"), "--by", "human"])
    assert capsys.readouterr().out.count("2 answers, 2 prompts") == 2  # one line per kind


@needs_browser
def test_in_a_browser_the_saved_file_has_the_answers_and_people_see_different_orders(launch, page, tmp_path):
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


def test_the_command_reports_file_questions_and_size(page, capsys):
    assert page.stat().st_size < 100_000
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page), "--singles", "2", "--sets", "0"])
    output = capsys.readouterr().out
    assert re.fullmatch(rf"{page}: .*\b4 questions\b.*\b2 prompts\b.* [1-9]\d* kB\n", output)


def test_stray_files_and_ids_without_a_text_are_reported(page, capsys):
    for side in ("ours", "dmd"):
        (page.parent / side / caption(0)).rename(page.parent / side / "00000")
    (page.parent / "dmd" / "notes.txt").touch()
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page)])
    written, strays, ids = capsys.readouterr().out.splitlines()
    assert written.startswith(str(page))
    assert f"{page.parent / 'dmd'} " in strays and strays.endswith(": notes.txt")
    assert "1 of 2" in ids and "(00000)" in ids and "--prompts" in ids


def test_a_picture_missing_on_one_side_shifts_no_pair_and_is_reported(page, capsys):
    ours, dmd = page.parent / "ours", page.parent / "dmd"
    (ours / caption(0) / "0.png").unlink()
    capsys.readouterr()
    main([str(ours), str(dmd), "--out", str(page), "--singles", "3", "--sets", "0"])
    notes = capsys.readouterr().out.splitlines()[1:]
    (note,) = notes
    assert note.endswith(f": {dmd / caption(0) / '0.png'}")


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--sets", "1"], "--sets 1 .*0 .*2"),
        (["--singles", "-1"], "--singles -1 .*0"),
        (["--sets", "0", "--singles", "0"], "--singles 0 --sets 0"),
        (["--side", "2"], "--side 2 .*16 pixels"),
        (["--out", "nowhere/x.html"], "--out nowhere/x.html.*/nowhere "),
        (["--out", "."], r"--out \. .*arena.html"),
        ([], "/a "),
    ],
)
def test_invalid_arguments_are_refused(arguments, facts, tmp_path):
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "x.html"), *arguments]
    with pytest.raises((ValueError, OSError), match=facts):
        main(command)


def test_one_question_about_one_prompt_is_in_the_singular(page, capsys):
    for side in ("ours", "dmd"):
        shutil.rmtree(page.parent / side / caption(1))
    capsys.readouterr()
    main([str(page.parent / "ours"), str(page.parent / "dmd"), "--out", str(page), "--singles", "1", "--sets", "0"])
    assert re.search(r"\b1 question\b.*\b1 prompt\b", capsys.readouterr().out)


def test_a_folder_is_not_compared_with_itself_under_any_name(page, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    for other in (tmp_path / "ours", tmp_path / "ours" / ".." / "ours", tmp_path / "link"):
        with refuses(ValueError, f"{tmp_path}/ours", f"{other}"):
            main([str(tmp_path / "ours"), str(other), "--out", str(page)])


def test_links_that_lead_to_themselves_are_refused(page, tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with refuses(OSError, f"{tmp_path}/loop"):
        main([str(tmp_path / "loop"), str(tmp_path / "ours"), "--out", str(page)])
    with refuses(OSError, f"--out {tmp_path}/loop"):
        main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", str(tmp_path / "loop")])


def test_names_in_notes_do_not_command_the_terminal(page, capsys):
    ours, dmd = (page.parent / name for name in ("ours", "dmd"))
    (dmd / "\x1b[2J\nforged.txt").touch()
    capsys.readouterr()
    main([str(ours), str(dmd), "--out", str(page)])
    assert capsys.readouterr().out.splitlines()[1].endswith(r": \x1b[2J\nforged.txt")


def test_a_page_that_cannot_be_written_is_refused_before_any_picture_is_read(page, tmp_path, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.commands.arena.find_pictures", lambda *_: pytest.fail("read before refused"))
    with pytest.raises(OSError, match="^--out /sys/x.html: .*/sys "):
        main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", "/sys/x.html"])


def test_a_folder_to_write_to_is_refused_before_any_picture_is_read(page, tmp_path, monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.commands.arena.find_pictures", lambda *_: pytest.fail("read before refused"))
    with pytest.raises(OSError, match=f"^--out {tmp_path}/ours .*{tmp_path}/ours/arena.html"):
        main([str(tmp_path / "ours"), str(tmp_path / "dmd"), "--out", str(tmp_path / "ours")])
