"""Curves stay in their frame, and only positive values are drawn."""

from tests.pipelines.report.conftest import made_history

from dpdmd_pipeline.pipelines.report.charts import CURVES, make_curve, make_curves


def test_a_curve_stays_in_its_frame_and_within_its_points():
    runs = {"dmd": made_history(0.0), "dp_dmd": made_history(1.0)}
    for key in CURVES:
        curve = make_curve(key, runs, 50)
        for points in curve["lines"].values():
            pairs = [tuple(map(float, pair.split(","))) for pair in points.split()]
            assert len(pairs) <= 50
            assert all(46 <= x <= 352 and 12 <= y <= 170 for x, y in pairs)
        assert curve["last"] == "120" and 1 <= len(curve["ticks"]) <= 6


def test_a_curve_without_positive_values_is_not_drawn():
    assert make_curve("grad_ratio", {"dmd": made_history(0.0)}, 50) is None
    runs = {"dmd": made_history(0.0), "dp_dmd": made_history(1.0)}
    assert list(make_curve("diversity_loss", runs, 50)["lines"]) == ["dp_dmd"]


def test_the_teacher_s_measurements_are_a_line_of_their_own():
    curves = {
        curve["title"]: curve for curve in make_curves({"dmd": made_history(0.0), "dp_dmd": made_history(1.0)}, 50)
    }
    for title in ("Diversity during training", "Quality during training"):
        heights = {pair.split(",")[1] for pair in curves[title]["lines"]["teacher"].split()}
        assert len(heights) == 1 and heights != {pair.split(",")[1] for pair in curves[title]["lines"]["dmd"].split()}
    assert "teacher" not in curves["DMD loss"]["lines"]
