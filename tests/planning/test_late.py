"""Refusals before the first node of options that only a late stage uses."""

from types import SimpleNamespace

import pytest
from kedro.io import DataCatalog, MemoryDataset

from dpdmd_pipeline.planning import late
from dpdmd_pipeline.planning.checks import refuse_run

SAMPLE = {"seed": 0, "images_per_prompt": 2}
EVALUATE = {"judge": "shapes", "by": ["diversity.clip_shapes"], "seed": 0}


def refusals(node: str, **groups) -> list[str]:
    """Lines for a run of one node with these parameter groups."""
    datasets = {f"params:{name}": MemoryDataset(options) for name, options in groups.items()}
    run = SimpleNamespace(
        nodes=[SimpleNamespace(name=node)], inputs=lambda: set(datasets), all_outputs=lambda: {"metrics"}
    )
    return refuse_run(run, DataCatalog(datasets))


@pytest.mark.parametrize("seed, pictures", [(2**32 - 2, 2), (2**32 - 1, 1), (0, 8)])
def test_the_last_seeds_are_accepted(seed, pictures):
    assert refusals("draw_samples", sample={"seed": seed, "images_per_prompt": pictures}) == []


@pytest.mark.parametrize("seed, pictures", [(2**32 - 1, 2), (2**32, 1), (2**32 - 4, 8)])
def test_a_seed_too_large_is_named_with_the_largest_allowed(seed, pictures):
    (line,) = refusals("draw_samples", sample={"seed": seed, "images_per_prompt": pictures})
    assert line.startswith(f"sample.seed = {seed}: ") and f"sample.images_per_prompt = {pictures}" in line
    assert line.endswith(f" {2**32 - pictures}")


def test_a_seed_that_torch_refuses_is_named_in_every_group():
    lines = refusals("x", evaluate={"seed": 2**64}, teacher={"recipe": {"seed": 2**63}}, train={"seed": 2**63 - 1})
    assert [line.partition(":")[0] for line in lines] == [f"evaluate.seed = {2**64}", f"teacher.recipe.seed = {2**63}"]


@pytest.mark.parametrize("node", ["score_images", "run_study"])
@pytest.mark.parametrize("resolution, judge", [(64, "shapes"), (64, None), (32, "shapes")])
def test_the_exact_reader_reads_one_size_of_pictures(node, resolution, judge):
    lines = refusals(node, evaluate={**EVALUATE, "judge": judge}, backbone={"resolution": resolution})
    assert len(lines) == (resolution == 64 and judge == "shapes")
    for fact in ("backbone.resolution = 64", "evaluate.judge=shapes", "backbone.resolution=32"):
        assert all(fact in line for line in lines)


def test_metrics_that_cannot_be_measured_are_refused(monkeypatch):
    names = ["quality.topiq", "quality.arniqa", "distribution.inception", "diversity.pixels"]
    evaluate = {**EVALUATE, "judge": None, "by": names}
    monkeypatch.setattr(late, "find_spec", lambda name: object())
    assert refusals("score_images", evaluate=evaluate) == []
    monkeypatch.setattr(late, "find_spec", lambda name: None)
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


def test_a_run_without_these_stages_has_no_late_faults():
    assert refusals("x", sample={**SAMPLE, "seed": 2**32}, evaluate={**EVALUATE, "by": ["beauty"]}) == []
