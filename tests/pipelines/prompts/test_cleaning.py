import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.pipelines.prompts import cleaning
from dpdmd_pipeline.pipelines.prompts.cleaning import clean_text, split_by_files, split_by_hash, survey

prompt = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
prompts = st.lists(prompt).filter(lambda lines: any(clean_text(line) for line in lines))


def write(folder, lines, name="prompts.txt"):
    (folder / name).write_bytes("\n".join(lines).encode())
    return PromptFile(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("prompts")


@given(st.text())
def test_cleaning_is_idempotent_and_leaves_normalised_words(text):
    clean = clean_text(text)
    assert clean_text(clean) == clean
    assert unicodedata.is_normalized("NFC", clean)
    assert clean.split() == clean.split(" ") or not clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a\t red \u3000 cat\r\n", "a red cat"),
        ("cafe\u0301", "café"),
        ("\ufeffa cat", "a cat"),
        ("50-year-old man, (3:1.2), [x] {y}", "50-year-old man, (3:1.2), [x] {y}"),
        ("👩‍👩‍👧 family", "👩‍👩‍👧 family"),
        ("שלום \u200fעולם", "שלום \u200fעולם"),
        ("A Cat!", "A Cat!"),
    ],
)
def test_words_stay_as_they_are(text, clean):
    assert clean_text(text) == clean


@given(lines=prompts)
def test_kept_texts_are_the_unique_clean_ones_in_their_order(folder, lines):
    found = survey(write(folder, lines))
    if found.file.is_numbered_list():
        return
    kept = [record["text"] for record in split_by_files(found, found)]
    assert kept == list(dict.fromkeys(filter(None, map(clean_text, lines))))


@given(lines=prompts)
def test_every_line_is_kept_or_reported(folder, lines):
    report = survey(write(folder, lines)).report()
    assert report["lines"] == report["kept"] + report["empty"] + report["repeated"]
    assert report["empty"] + report["repeated"] == len(report["dropped"])


def test_dropped_lines_are_reported_one_by_one(tmp_path):
    report = survey(write(tmp_path, ["a cat", "", " a  cat ", "a dog", "\ufeff", "a cat"])).report()
    assert (report["lines"], report["kept"], report["empty"], report["repeated"]) == (6, 2, 2, 2)
    assert [(drop["line"], drop["reason"]) for drop in report["dropped"]] == [
        (2, "empty"),
        (3, "repeats line 1"),
        (5, "empty"),
        (6, "repeats line 1"),
    ]


def test_the_list_of_dropped_lines_is_capped_and_the_counts_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(cleaning, "MAX_LISTED", 3)
    report = survey(write(tmp_path, ["a cat"] * 10)).report()
    assert (report["repeated"], len(report["dropped"])) == (9, 3)


def test_a_text_of_both_files_is_one_record_with_both_uses(tmp_path):
    train = survey(write(tmp_path, ["a cat", "a dog"]))
    evaluation = survey(write(tmp_path, ["a cow", " a dog", "a cow"], "eval.txt"))
    split = split_by_files(train, evaluation)
    assert list(split) == [
        {"text": "a cat", "train": True, "eval": False},
        {"text": "a dog", "train": True, "eval": True},
        {"text": "a cow", "train": False, "eval": True},
    ]
    assert split.count() == {"prompts": 3, "train": 2, "eval": 2, "both": 1}


def test_a_share_is_about_that_share_and_disjoint(tmp_path):
    counts = split_by_hash(survey(write(tmp_path, [f"cat {index}" for index in range(2000)])), 0.1).count()
    assert 150 < counts["eval"] < 250
    assert counts["both"] == 0
    assert counts["train"] + counts["eval"] == counts["prompts"] == 2000


@given(added=st.lists(prompt), place=st.integers(0, 50))
def test_added_lines_move_no_prompt_to_the_other_side(folder, added, place):
    lines = [f"{index} cats" for index in range(50)]
    before = list(split_by_hash(survey(write(folder, lines)), 0.3))
    after = list(split_by_hash(survey(write(folder, lines[:place] + added + lines[place:])), 0.3))
    assert all(record in after for record in before)


def test_a_split_without_one_side_is_refused(tmp_path):
    found = survey(write(tmp_path, ["a cat", "a dog"]))
    with pytest.raises(ValueError, match=r"eval_share 1e-09 leaves no eval prompt of the 2 in .*prompts\.txt"):
        split_by_hash(found, 1e-9)
    with pytest.raises(ValueError, match=r"eval_share 0\.999999999 leaves no train prompt"):
        split_by_hash(found, 0.999999999)


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.txt is empty: write one prompt a line"):
        survey(write(tmp_path, []))
    with pytest.raises(ValueError, match=r"prompts\.txt has no prompt: its 2 lines are blank"):
        survey(write(tmp_path, [" ", "\t", ""]))
