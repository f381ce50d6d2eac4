"""The verdict says what the numbers say, whichever way they went."""

import pytest
from tests.pipelines.report.conftest import made_gap, made_metrics, without_reader

from dpdmd_pipeline.pipelines.report.wording import make_verdict


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        (made_metrics(), "recovers 90 % of the diversity that DMD lost: 58.0 effective modes"),
        (made_metrics(modes=(64, 5, 65)), "recovers all of the diversity"),
        (made_metrics(modes=(64, 5, 20)), "recovers only 25 % of the diversity"),
        (made_metrics(modes=(64, 5, 4)), "does not recover the diversity that DMD lost"),
        (made_metrics(modes=(64, 5, 5.1)), "does not measurably recover the diversity"),
        (made_metrics(modes=(60, 62, 61)), "DMD lost no diversity here"),
        (made_metrics(modes=(60, 59, 61)), "cannot be told from chance"),
    ],
)  # fmt: skip
def test_the_verdict_says_what_became_of_diversity(metrics, says):
    assert says in make_verdict(metrics)


@pytest.mark.parametrize(
    ("valid", "says"),
    [
        ((0.95, 0.87, 0.91), "; DP-DMD's pictures are valid no less often than DMD's, 91.0 % against 87.0 %."),
        ((0.95, 0.91, 0.90), "; DP-DMD's pictures are valid a little less often than DMD's, within the uncertainty"),
        ((0.95, 0.91, 0.70), ", but DP-DMD's pictures are valid less often than DMD's, 70.0 % against 91.0 %."),
    ],
)
def test_the_verdict_does_not_hide_a_loss_of_quality(valid, says):
    assert says in make_verdict(made_metrics(valid=valid))


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        (((0.3, 0.1, 0.25), (21, 22, 22.5)), "recovers 75 % of the diversity that DMD lost: 0.25 by diversity.dino_v2"),
        (((0.3, 0.1, 0.25), (21, 22, 22.5)), "; DP-DMD's pictures score no lower than DMD's, 22.5 against 22 by pref"),
        (((0.3, 0.1, 0.25), (21, 22, 21.99)), "score a little lower than DMD's, within the uncertainty"),
        (((0.3, 0.1, 0.25), (21, 22, 20)), ", but DP-DMD's pictures score lower than DMD's, 20 against 22"),
        (((0.3, 0.29, 0.3), (21, 22, 22)), "cannot be told from chance"),
        (((0.3, 0.4, 0.5), (21, 22, 22)), "DMD lost no diversity here"),
    ],
)
def test_without_the_exact_reader_the_verdict_is_of_the_first_metrics_that_all_models_have(figures, says):
    assert says in make_verdict(without_reader(figures))


def test_pixels_are_taken_for_a_verdict_only_where_there_is_nothing_else():
    metrics = without_reader()
    for model in ("teacher", "dmd", "dp_dmd"):
        figures = metrics[model]["figures"]
        figures |= {"diversity.pixels.mean_distance": figures["diversity.dino_v2.one_minus_cosine"]}
        metrics[model]["figures"] = dict(reversed(figures.items()))
    metrics["dp_dmd"]["gaps"] |= {"diversity.pixels.mean_distance": made_gap(0.1)}
    assert "by diversity.dino_v2" in make_verdict(metrics)
    for model in ("teacher", "dmd", "dp_dmd"):
        del metrics[model]["figures"]["diversity.dino_v2.one_minus_cosine"]
    assert "by diversity.pixels" in make_verdict(metrics)
