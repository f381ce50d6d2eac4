"""docs/study.md shows the committed study."""

from benchmarks.study_table import PAGE, fill_tables, make_table
from tests.pipelines.study.test_figure import made_study
from tests.raising import refuses


def test_the_tables_of_the_page_are_those_of_the_committed_study():
    text = PAGE.read_text()
    assert fill_tables(text) == text, "run `python benchmarks/study_table.py`"


def test_a_run_missing_from_one_world_has_empty_cells_and_an_unusual_number_of_seeds_is_shown():
    flow, eps = made_study(("dmd", "dp_dmd")), made_study(("dmd", "lambda_1"))
    flow["rows"] = [row for row in flow["rows"] if (row["run"], row["seed"]) != ("dp_dmd", 1)]
    table = make_table({"flow": flow, "eps": eps})
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in table.splitlines()}
    assert list(rows) == ["run", "---", "teacher", "dmd", "dp_dmd", "lambda_1"]
    assert rows["dp_dmd"].endswith("(1 seed) |  |  |  |") and "seed" not in rows["dmd"]
    assert rows["lambda_1"].split(" | ")[2:5] == ["", "", ""] and "`diversity_weight=1.0`" in rows["lambda_1"]
    assert len({line.count("|") for line in rows.values()}) == 1


def test_a_run_that_differs_between_the_worlds_is_refused():
    flow, eps = made_study(("dmd", "dp_dmd")), made_study(("dmd", "dp_dmd"))
    eps["runs"]["dp_dmd"] = {"train": {"max_steps": 9}}
    with refuses(SystemExit, "dp_dmd"):
        make_table({"flow": flow, "eps": eps})


def test_a_page_without_a_table_s_markers_is_refused():
    with refuses(SystemExit, "<!-- study -->"):
        fill_tables("# No table")
