"""The verdict says what the numbers say, whichever way they went."""

import pytest
from tests.pipelines.report.conftest import made_metrics

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
