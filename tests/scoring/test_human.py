import json
import math
import os
import re

import pytest

from dpdmd_pipeline.scoring.human import as_text, load_results, summarise, wilson
from dpdmd_pipeline.scoring.scores import Scores
from dpdmd_pipeline.scoring.table import as_record


def save(folder, name, choices, **changes):
    """Save a file like the page's, with (prompt, choice) of one kind of question."""
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
    figures = summary["questions"]["quality"]
    assert figures["counts"] == {"a": 3, "b": 1, "tie": 2} and figures["n"] == {"answers": 6, "prompts": 3}
    assert math.isclose(figures["for_a"]["value"], 4 / 6) and figures["for_a"]["low"] == 0.5
    assert figures["for_a_decided"]["value"] == 0.75
    assert [figures["for_a_decided"][end] for end in ("low", "high")] == list(wilson(3, 4))
    text = as_text(summary)
    assert all(part in text for part in ("ours", "dmd", "2 people", "A 3, B 1", "6 answers", "3 prompts", "75.0%"))


def test_people_with_unanswered_questions_are_named_with_both_numbers(tmp_path):
    complete = save(tmp_path, "p0", [("cat", "a"), ("dog", "b")])
    partial = save(tmp_path, "p1", [("cat", "a")], questions=24)
    summary = summarise(load_results([complete, partial]), seed=0)
    assert summary["unfinished"] == {"p1": {"answers": 1, "questions": 24}}
    (line,) = (line for line in as_text(summary).splitlines() if "p1" in line)
    assert "1 of 24" in line and "p0" not in as_text(summary)


def test_all_ties_decide_nothing(tmp_path):
    summary = summarise(load_results([save(tmp_path, "one", [("cat", "tie")])]), seed=0)
    assert summary["questions"]["quality"]["for_a_decided"]["value"] is None
    assert summary["questions"]["quality"]["for_a_decided"]["low"] is None and as_text(summary)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"format": 2}, r"\bformat\b.*\b1\b.*\b2\b"),
        ({"answers": [{"choice": "c"}]}, r"answers.0.choice\b.*'a', 'b' or 'tie'.*'c'"),
        ({"arena": "y"}, "one.json"),
        ({"participant": "one"}, "one.json.*'one'"),
    ],
)
def test_results_that_do_not_belong_together_are_refused(tmp_path, changes, facts):
    files = [save(tmp_path, "one", [("cat", "a")]), save(tmp_path, "two", [("cat", "a")], **changes)]
    with pytest.raises(ValueError, match=rf"^{files[1]}\b.*{facts}"):
        load_results(files)


def test_another_json_file_and_results_without_an_answer_are_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path}/x.json "):
        load_results([tmp_path / "x.json"])
    with pytest.raises(ValueError):
        summarise(load_results([save(tmp_path, "one", [])]), seed=0)


@pytest.mark.parametrize(
    ("changes", "facts"),
    [
        ({"arena": None}, r"\barena\b"),
        ({"arena": None, "answers": None}, r"\barena\b.*\banswers\b"),
        ({"questions": "24"}, r"\bquestions\b.*'24'"),
        ({"questions": 0}, r"1 answers\b.*\b0 questions\b"),
        ({"participant": ["one"]}, r"\bparticipant\b"),
        ({"answers": ["a"]}, r"answers\.0\b.*'a'"),
        ({"answers": [{"choice": "a", "prompt": "cat"}]}, r"answers\.0\.question\b"),
        ({"answers": [{"choice": "a"}]}, r"answers\.0\.question\b.*answers\.0\.prompt\b"),
        ({"answers": [{"choice": ["a"], "prompt": "cat", "question": "quality"}]}, r"answers\.0\.choice\b"),
    ],
)
def test_an_incomplete_result_is_refused_with_file_and_remedy(tmp_path, changes, facts):
    file = save(tmp_path, "one", [("cat", "a")], **changes)
    with pytest.raises(ValueError, match=rf"^{file}\b.*{facts}.*button") as refused:
        load_results([file])
    assert "\n" not in str(refused.value)


def test_a_file_of_score_json_is_refused_though_its_format_has_the_same_number(tmp_path):
    scores = Scores(prompts=1, pictures=2)
    (tmp_path / "scores.json").write_text(json.dumps(as_record(scores)))
    with pytest.raises(ValueError, match=f"^{tmp_path}/scores.json .*button"):
        load_results([tmp_path / "scores.json"])


@pytest.mark.parametrize("depth", [900, 100_000])
def test_a_deeply_nested_result_is_refused(tmp_path, depth):
    deep = "[" * depth + "]" * depth
    for content in (deep, f'{{"format": {deep}}}', f'{{"format": 1, "answers": {deep}}}'):
        (tmp_path / "x.json").write_text(content)
        with pytest.raises(ValueError, match=f"^{tmp_path}/x.json "):
            load_results([tmp_path / "x.json"])


def test_names_in_results_do_not_command_the_terminal(tmp_path):
    name = "x\x1b[2J\r\ud800\nforged"
    file = save(tmp_path, "p1", [("cat", "a")], participant=name, a=name, b=name, questions=2)
    result = json.loads(file.read_text())
    result["answers"][0] |= {"question": name, "prompt": name}
    file.write_text(json.dumps(result))
    text = as_text(summarise(load_results([file]), seed=0))
    assert text.count(r"x\x1b[2J\r\ud800\nforged") == 4
    assert all(line.isprintable() for line in text.split("\n")) and text.count("\n") == 3


@pytest.mark.parametrize(("name", "fact"), [("", "not a file"), ("gone.json", "not exist"), ("pipe", "not a file")])
def test_a_folder_a_pipe_and_a_missing_file_are_refused_by_name_with_the_remedy(tmp_path, name, fact):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=rf"^{tmp_path / name} .*{fact}.*button"):
        load_results([tmp_path / name])


def test_one_person_with_one_answer_is_in_the_singular(tmp_path):
    text = as_text(summarise(load_results([save(tmp_path, "one", [("cat", "a")])]), seed=0))
    assert all(re.search(rf"\b1 {noun}\b", text) for noun in ("person", "answer", "prompt"))
