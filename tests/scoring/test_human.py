import json
import math

import pytest

from dpdmd_pipeline.scoring.human import as_text, load_results, summarise, wilson
from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.scoring.table import as_record


def save(folder, name, choices, **changes):
    """A file as the page saves it: (prompt, choice) of one question kind."""
    answers = [
        {"id": f"{prompt}/{number}", "question": "quality", "prompt": prompt, "left": "a", "choice": choice}
        for number, (prompt, choice) in enumerate(choices)
    ]
    page = {"format": 1, "arena": "x", "a": "ours", "b": "dmd", "questions": len(answers)}
    result = page | {"participant": name, "answers": answers} | changes
    file = folder / f"{name}.json"
    file.write_text(json.dumps(result))
    return file


def test_the_wilson_interval_solves_its_equation_and_stays_in_range():
    for wins, total in ((0, 5), (5, 5), (3, 10), (40, 50)):
        for bound in wilson(wins, total):
            share = wins / total
            assert 0 <= bound <= 1
            if 1e-9 < bound < 1 - 1e-9:  # |share - p| = z sqrt(p (1 - p) / n)
                half = 1.959964 * (bound * (1 - bound) / total) ** 0.5
                assert math.isclose(abs(share - bound), half, rel_tol=1e-6)


def test_answers_become_shares_with_intervals(tmp_path):
    one = save(tmp_path, "one", [("cat", "a"), ("dog", "a"), ("cow", "tie")])
    two = save(tmp_path, "two", [("cat", "a"), ("dog", "b"), ("cow", "tie")])
    summary = summarise(load_results([one, two]), seed=0)
    found = summary["questions"]["quality"]
    assert found["counts"] == {"a": 3, "b": 1, "tie": 2} and found["n"] == {"answers": 6, "prompts": 3}
    assert math.isclose(found["for_a"]["value"], 4 / 6) and found["for_a"]["low"] == 0.5
    assert found["for_a_decided"]["value"] == 0.75
    assert [found["for_a_decided"][end] for end in ("low", "high")] == list(wilson(3, 4))
    assert "A is ours, B is dmd; 2 people" in as_text(summary) and "A 3, B 1, no difference 2" in as_text(summary)


def test_who_has_not_answered_all_is_named_with_both_numbers(tmp_path):
    all_of_it = save(tmp_path, "p0", [("cat", "a"), ("dog", "b")])
    some = save(tmp_path, "p1", [("cat", "a")], questions=24)
    summary = summarise(load_results([all_of_it, some]), seed=0)
    assert summary["unfinished"] == {"p1": {"answers": 1, "questions": 24}}
    assert "\n  p1 answered 1 of 24\n" in as_text(summary) and "p0 answered" not in as_text(summary)


def test_all_ties_decide_nothing(tmp_path):
    found = summarise(load_results([save(tmp_path, "one", [("cat", "tie")])]), seed=0)
    assert found["questions"]["quality"]["for_a_decided"]["value"] is None
    assert "no decided answer" in as_text(found)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"answers": [{"choice": "c"}]}, "choice 'c' is none of a, b, tie"),
        ({"arena": "y"}, "of another page than"),
        ({"participant": "one"}, "are both of participant 'one'"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(tmp_path, changes, told):
    files = [save(tmp_path, "one", [("cat", "a")]), save(tmp_path, "two", [("cat", "a")], **changes)]
    with pytest.raises(ValueError, match=told):
        load_results(files)


def test_what_is_no_result_and_what_has_no_answer_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="is no result of an arena page"):
        load_results([tmp_path / "x.json"])
    with pytest.raises(ValueError, match="no answer in these results"):
        summarise(load_results([save(tmp_path, "one", [])]), seed=0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"arena": None}, "is no result of an arena page, it has no arena: give the files that the page's button"),
        ({"arena": None, "answers": None}, "it has no arena and no answers"),
        ({"questions": "24"}, "it has no questions"),
        ({"participant": ["one"]}, "it has no participant"),
        ({"answers": ["a"]}, "answer 0 is no object"),
        ({"answers": [{"choice": "a", "prompt": "cat"}]}, "answer 0 has no question"),
        ({"answers": [{"choice": "a"}]}, "answer 0 has no question and no prompt"),
        (
            {"answers": [{"choice": ["a"], "prompt": "cat", "question": "quality"}]},
            r"choice \['a'\] is none of a, b, tie",
        ),
    ],
)
def test_a_result_that_lacks_something_is_refused_in_one_line_with_file_and_remedy(tmp_path, changes, told):
    file = save(tmp_path, "one", [("cat", "a")], **changes)
    with pytest.raises(ValueError, match=told) as refused:
        load_results([file])
    assert str(refused.value).startswith(str(file)) and "the page's button saves" in str(refused.value)


def test_a_file_of_score_json_is_no_result_of_a_page_though_of_the_same_format(tmp_path):
    scores = Scores(prompts=1, pictures=2)
    (tmp_path / "scores.json").write_text(json.dumps(as_record(scores)))
    with pytest.raises(ValueError, match="scores.json is no result of an arena page.*: give the files that the page's"):
        load_results([tmp_path / "scores.json"])


@pytest.mark.parametrize(("name", "told"), [("", "Is a directory"), ("gone.json", "No such file")])
def test_a_folder_and_an_absent_file_are_refused_by_name_with_the_remedy(tmp_path, name, told):
    with pytest.raises(OSError, match=rf"cannot be read \({told}.*\): give the files that the page's") as refused:
        load_results([tmp_path / name])
    assert str(refused.value).startswith(str(tmp_path / name))


def test_one_of_a_kind_is_told_in_the_singular(tmp_path):
    text = as_text(summarise(load_results([save(tmp_path, "one", [("cat", "a")])]), seed=0))
    assert "; 1 person\n" in text and "(1 answer, 1 prompt)" in text
