"""The verdict agrees with the numbers."""

import pytest
from tests.pipelines.report.conftest import made_gap, made_metrics, without_reader

from dpdmd_pipeline.pipelines.report.wording import make_verdict


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (made_metrics(), ("recovers 90 %", "58.0 distinct kinds of picture")),
        (made_metrics(modes=(64, 5, 65)), ("recovers all", "65.0", "5.0", "64.0")),
        (made_metrics(modes=(64, 5, 20)), ("recovers only 25 %", "20.0")),
        (made_metrics(modes=(64, 5, 4)), ("does not recover", "4.0")),
        (made_metrics(modes=(64, 5, 5.1)), ("does not measurably recover", "5.1")),
        (made_metrics(modes=(60, 62, 61)), ("lost no diversity", "61.0")),
        (made_metrics(modes=(60, 59, 61)), ("Chance", "unknown", "61.0")),
    ],
)  # fmt: skip
def test_the_verdict_states_the_diversity_that_dp_dmd_recovers(metrics, words):
    verdict = make_verdict(metrics)
    assert all(word in verdict for word in words), verdict


@pytest.mark.parametrize(
    ("valid", "words"),
    [
        ((0.95, 0.87, 0.91), ("valid at least as often", "91.0 % against 87.0 %")),
        ((0.95, 0.91, 0.90), ("slightly less often", "within the uncertainty", "90.0 % against 91.0 %")),
        ((0.95, 0.91, 0.70), (", but", "valid less often", "70.0 % against 91.0 %")),
    ],
)
def test_the_verdict_states_a_loss_of_quality(valid, words):
    verdict = make_verdict(made_metrics(valid=valid))
    assert all(word in verdict for word in words), verdict


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        (((0.3, 0.1, 0.25), (21, 22, 22.5)), ("recovers 75 %", "0.25 by diversity.dino_v2")),
        (((0.3, 0.1, 0.25), (21, 22, 22.5)), ("at least as high", "22.5 against 22 by preference.pickscore")),
        (((0.3, 0.1, 0.25), (21, 22, 21.99)), ("slightly lower", "within the uncertainty")),
        (((0.3, 0.1, 0.25), (21, 22, 20)), (", but", "score lower", "20 against 22")),
        (((0.3, 0.29, 0.3), (21, 22, 22)), ("Chance", "unknown")),
        (((0.3, 0.4, 0.5), (21, 22, 22)), ("lost no diversity",)),
    ],
)
def test_without_the_exact_reader_the_verdict_uses_the_first_metrics_that_all_models_have(figures, words):
    verdict = make_verdict(without_reader(figures))
    assert all(word in verdict for word in words), verdict


def test_the_verdict_uses_pixels_only_without_another_metric():
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
