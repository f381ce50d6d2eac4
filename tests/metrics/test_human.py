import json
import math

import pytest

from dpdmd_pipeline.metrics.human import as_text, load_results, summarise, wilson


def save(folder, name, choices, **changes):
    """A file as the page saves it: (prompt, choice) of one question kind."""
    answers = [
        {"id": f"{prompt}/{number}", "question": "quality", "prompt": prompt, "left": "a", "choice": choice}
        for number, (prompt, choice) in enumerate(choices)
    ]
    result = {"format": 1, "arena": "x", "a": "ours", "b": "dmd", "participant": name, "answers": answers} | changes
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
