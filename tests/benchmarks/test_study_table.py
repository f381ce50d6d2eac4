"""The README shows the committed study."""

import pytest
from benchmarks.study_table import ROOT, fill, table
from tests.pipelines.study.test_figure import made_study


def test_the_readme_has_the_tables_of_the_committed_study():
    text = (ROOT / "README.md").read_text()
    assert fill(text) == text, "run `python benchmarks/study_table.py`"


def test_a_missing_run_has_empty_cells_and_an_unusual_number_of_seeds_is_shown():
    flow, eps = made_study(("dmd", "dp_dmd")), made_study(("dmd", "lambda_1"))
    flow["rows"] = [row for row in flow["rows"] if (row["run"], row["seed"]) != ("dp_dmd", 1)]
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table({"flow": flow, "eps": eps}).splitlines()}
    assert list(rows) == ["run", "---", "teacher", "dmd", "dp_dmd", "lambda_1"]
    assert rows["dp_dmd"].endswith("(1 seed) |  |  |  |") and "seed" not in rows["dmd"]
    assert rows["lambda_1"].split(" | ")[2:5] == ["", "", ""] and "`diversity_weight=1.0`" in rows["lambda_1"]
    assert len({line.count("|") for line in rows.values()}) == 1


def test_a_run_with_other_changes_in_each_world_is_refused():
    flow, eps = made_study(("dmd", "dp_dmd")), made_study(("dmd", "dp_dmd"))
    eps["runs"]["dp_dmd"] = {"train": {"max_steps": 9}}
    with pytest.raises(SystemExit, match="dp_dmd"):
        table({"flow": flow, "eps": eps})


def test_a_readme_without_the_marks_of_a_table_is_refused():
    with pytest.raises(SystemExit, match="0 .*<!-- study -->"):
        fill("# No table")
