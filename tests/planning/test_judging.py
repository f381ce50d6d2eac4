"""Refusals before the first node of what the evaluation could not judge: resolution, metrics."""

from types import SimpleNamespace

import pytest
from kedro.io import DataCatalog, MemoryDataset
from tests.pipelines.conftest import BACKBONE

from dpdmd_pipeline.planning import judging
from dpdmd_pipeline.planning.checks import refuse_run, unfit_sizes

EVALUATE = {"judge": "shapes", "by": ["diversity.clip_shapes"], "seed": 0}


def refusals(node: str, **groups) -> list[str]:
    """Lines for a run of one node with these parameter groups."""
    datasets = {f"params:{name}": MemoryDataset(options) for name, options in groups.items()}
    datasets["prompts"] = MemoryDataset([])
    run = SimpleNamespace(
        nodes=[SimpleNamespace(name=node)], inputs=lambda: set(datasets), all_outputs=lambda: {"metrics"}
    )
    return refuse_run(run, DataCatalog(datasets))


@pytest.mark.parametrize("node", ["score_images", "run_study", "make_anchors"])
@pytest.mark.parametrize(
    "resolution, judge", [(64, "shapes"), (64, None), (32, "shapes"), ([[32, 32], [32, 64]], "shapes")]
)
def test_the_exact_reader_reads_one_size_of_pictures(node, resolution, judge):
    lines = refusals(node, evaluate={**EVALUATE, "judge": judge}, backbone={"resolution": resolution})
    assert len(lines) == (resolution != 32 and judge == "shapes")
    for fact in (f"backbone.resolution = {resolution}", "evaluate.judge=shapes", "backbone.resolution=32"):
        assert all(fact in line for line in lines)


def test_metrics_that_cannot_be_measured_are_refused(monkeypatch):
    names = ["quality.topiq", "quality.arniqa", "distribution.inception", "diversity.pixels"]
    evaluate = {**EVALUATE, "judge": None, "by": names}
    monkeypatch.setattr(judging, "find_spec", lambda name: object())
    assert refusals("score_images", evaluate=evaluate) == []
    monkeypatch.setattr(judging, "find_spec", lambda name: None)
    lines = refusals("score_images", evaluate=evaluate)
    for line, facts in zip(
        lines,
        [
            ("quality.arniqa", "torchmetrics", "[metrics]"),
            ("quality.topiq", "pyiqa", "[iqa]"),
            ("distribution.inception", "torch-fidelity", "[metrics]"),
        ],
        strict=True,
    ):
        assert all(fact in line for fact in ("evaluate.by", *facts)) and "\n" not in line


def test_an_unknown_metric_is_refused():
    (line,) = refusals("score_images", evaluate={**EVALUATE, "by": ["beauty"]})
    assert "evaluate.by" in line and "beauty" in line


@pytest.mark.parametrize("size, facts", [([30, 32], ["sample.size 30 x 32", "32 x 32"]), ([16, 32], []), (None, [])])
def test_pictures_of_a_size_that_no_patch_divides_are_refused_before_the_run(tiny_teacher, size, facts):
    teacher = SimpleNamespace(load=lambda: tiny_teacher)
    groups = {"sample": {"size": size}, "backbone": BACKBONE}
    datasets = {f"params:{name}": MemoryDataset(options) for name, options in groups.items()}
    run = SimpleNamespace(inputs=lambda: {"params:sample"})
    lines = [*unfit_sizes(run, {"teacher": teacher, **datasets})]
    assert len(lines) == bool(facts) and all(fact in line for fact in facts for line in lines)


def test_a_run_without_these_stages_is_not_checked():
    assert refusals("x", evaluate={**EVALUATE, "by": ["beauty"]}) == []
