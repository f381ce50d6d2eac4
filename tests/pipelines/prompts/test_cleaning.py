import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.raising import refuses

from dpdmd_pipeline.datasets.prompt_file import PromptFile
from dpdmd_pipeline.pipelines.prompts import cleaning
from dpdmd_pipeline.pipelines.prompts.cleaning import clean_text, split_by_files, split_by_hash, survey, take
from dpdmd_pipeline.wording import is_blank

prompt = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]))
prompts = st.lists(prompt).filter(lambda lines: not all(is_blank(clean_text(line)) for line in lines))


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
def test_cleaning_does_not_change_words(text, clean):
    assert clean_text(text) == clean


@given(lines=prompts)
def test_kept_texts_are_the_unique_clean_ones_in_their_order(folder, lines):
    result = survey(write(folder, lines))
    if result.file.is_numbered_list():
        return
    texts = [record["text"] for record in split_by_files(result, result)]
    assert texts == list(dict.fromkeys(text for text in map(clean_text, lines) if not is_blank(text)))


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


@given(added=st.lists(prompt), index=st.integers(0, 50))
def test_added_lines_change_no_prompts_use(folder, added, index):
    lines = [f"{index} cats" for index in range(50)]
    before = list(split_by_hash(survey(write(folder, lines)), 0.3))
    after = list(split_by_hash(survey(write(folder, lines[:index] + added + lines[index:])), 0.3))
    assert all(record in after for record in before)


def test_a_split_without_one_use_is_refused(tmp_path):
    result = survey(write(tmp_path, ["a cat", "a dog"]))
    with pytest.raises(ValueError, match=r"prompts\.eval_share 1e-09 .*eval prompt.*\b2\b.*prompts\.txt"):
        split_by_hash(result, 1e-9)
    with refuses(ValueError, "prompts.eval_share 0.999999999", "train prompt"):
        split_by_hash(result, 0.999999999)


def test_a_file_without_prompts_is_refused(tmp_path):
    with refuses(ValueError, "prompts.txt", "empty"):
        survey(write(tmp_path, []))
    with pytest.raises(ValueError, match=r"prompts\.txt .*\b2\b.*blank"):
        survey(write(tmp_path, [" ", "\t", ""]))


# ---- some of many


def taken(folder, lines, count, seed=0):
    result = take(survey(write(folder, lines)), count, seed)
    return result, [record["text"] for record in split_by_files(result, survey(write(folder, ["a dog"], "eval.txt")))]


MANY = [f"{number} cats" for number in range(300)]


def test_a_sample_has_its_size_and_the_order_of_the_file_and_depends_on_the_seed(folder):
    result, texts = taken(folder, [*MANY, *MANY, " "], 50)
    assert texts[-1] == "a dog" and len(texts) == 51 and texts[:-1] == [text for text in MANY if text in texts]
    report = result.report()
    assert (report["kept"], report["not_taken"], report["repeated"], report["empty"]) == (50, 250, 300, 1)
    assert len(set(texts) & set(taken(folder, MANY, 50, seed=1)[1])) < 26
    assert taken(folder, MANY, 300)[1] == [*MANY, "a dog"]


def test_a_larger_sample_or_file_keeps_most_of_the_smaller_ones(folder):
    _, texts = taken(folder, MANY, 50)
    assert set(texts) < set(taken(folder, MANY, 60)[1])
    assert len(set(texts) - set(taken(folder, ["a bird", *MANY[::-1]], 50)[1])) <= 1


def test_a_sample_is_independent_of_the_share_for_evaluation(folder):
    result, _ = taken(folder, MANY, 100)
    counts = split_by_hash(result, 0.5).count()
    assert counts["prompts"] == 100 and 35 < counts["eval"] < 65


def test_a_text_that_is_not_taken_may_still_evaluate(folder):
    result = take(survey(write(folder, MANY)), 1, 0)
    records = list(split_by_files(result, survey(write(folder, MANY[:2], "eval.txt"))))
    assert sum(record["train"] for record in records) == 1 and sum(record["eval"] for record in records) == 2
    assert len({record["text"] for record in records}) == len(records)


def test_more_than_there_is_cannot_be_taken(folder):
    with refuses(ValueError, "prompts.take=3", "prompts.txt", "2 different"):
        taken(folder, ["a", "b", "a"], 3)
