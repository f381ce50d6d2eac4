"""The README shows the study that is committed."""

import pytest
from benchmarks.study_table import ROOT, filled, load, table


def test_the_tables_of_the_readme_are_those_of_the_committed_study():
    text = (ROOT / "README.md").read_text()
    assert filled(text) == text, "python benchmarks/study_table.py puts them in"


def test_a_run_that_a_world_lacks_has_empty_cells_and_another_number_of_seeds_is_told():
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table(load("beyond")).splitlines()}
    assert rows["two_anchors_lambda_3_200"].endswith("(5 seeds) |  |  |  |")
    assert rows["secant"].split(" | ")[2:5] == ["", "", ""]
    assert len({line.count("|") for line in rows.values()}) == 1


def test_a_readme_without_a_table_s_marks_is_refused():
    with pytest.raises(SystemExit, match="0 tables marked <!-- study -->"):
        filled("# No table")
