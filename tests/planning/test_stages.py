"""Costs of stages in words and counts; tests/pipelines/train/test_environments.py holds them to whole runs."""

from types import SimpleNamespace

import pytest
import torch
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from tests.pipelines.conftest import anchor_options, train_options
from tests.raising import refuses

from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.planning.cost import Passes, anchored_prompts
from dpdmd_pipeline.planning.plan import Counts, Plan, _check_draws, _most_prompts
from dpdmd_pipeline.planning.stages import StageCost, describe_stages, matmul_rate

COSTS = [StageCost("prompts", Passes(), 27 * 2**30), StageCost("anchors", Passes(80_000), 2**30)]
COSTS += [StageCost("train", Passes(1_000_000, 400_000, 200_000), 0)]


def test_the_table_has_forwards_work_disk_and_the_hours_of_a_measured_card():
    title, *lines, note = describe_stages(COSTS, 11.3e12, 500e12)
    rows = {line.split()[0]: line.split()[1:] for line in lines}
    assert all(word in title for word in ("forwards", "PFLOP", "disk GiB", "GPU hours")) and "500 TFLOP/s" in note
    assert rows["prompts"] == ["27.000"] and rows["anchors"][:3] == ["80,000", "904", "1.000"]
    assert rows["train"][0] == "2,000,000"  # a backward pass counts two
    hours = [80_000 * 11.3e12 / 500e12 / 3600, 2_000_000 * 11.3e12 / 500e12 / 3600]
    assert [float(rows[stage][-1]) for stage in ("anchors", "train")] == pytest.approx(hours, rel=0.05)
    assert len({len(line) for line in lines[1:]}) == 1


def test_without_a_card_and_counted_work_the_table_has_neither():
    title, *lines = describe_stages(COSTS, None, None)
    assert "hours" not in title and [line.split()[1:] for line in lines] == [
        ["27.000"],
        ["80,000", "1.000"],
        ["2,000,000", "0.000"],
    ]


def test_the_rate_of_a_device_is_measured():
    assert 1e7 < matmul_rate(torch.device("cpu"), torch.float32, size=256, repeats=2) < 1e14


def test_anchors_belong_to_all_prompts_unless_training_draws_fewer_samples():
    options, recipe = anchor_options(seeds_per_prompt=5), train_options(max_steps=4, batch_size=2)
    assert [anchored_prompts(count, options, recipe) for count in (7, 8, 9)] == [(7, 5), (8, 5), (8, 1)]
    assert anchored_prompts(9, options, None) == (9, 5)


def test_anchors_of_fewer_prompts_than_training_draws_are_refused_with_both_numbers(tmp_path):
    catalog = DataCatalog({"anchors": MemoryDataset(SimpleNamespace(manifest={"anchored_prompts": 4}))})

    def plan(cycles):
        recipe = train_options(max_steps=cycles, batch_size=2)
        return Plan(tmp_path, None, anchor_options(), {}, Counts(9, 9, 0), train=recipe)

    _check_draws(plan(2), catalog)
    with refuses(StageError, "4 prompts", "train.max_steps=3", "train.batch_size=2"):
        _check_draws(plan(3), catalog)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({"take": None, "eval_share": None}, (6, 4, 2)),
        ({"take": 3, "eval_share": None}, (5, 3, 2)),
        ({"take": 9, "eval_share": None}, (6, 4, 2)),
        ({"take": None, "eval_share": 0.3}, (4, 4, 2)),
    ],
)
def test_prompts_are_counted_before_they_are_cleaned(tmp_path, options, counts):
    files = {"raw_prompts": "a\nb\n\nc\nd\n", "raw_eval_prompts": "e\nf\n"}
    catalog = DataCatalog({"params:prompts": MemoryDataset(options)})
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
        catalog[name] = PromptFileDataset(filepath=str(tmp_path / f"{name}.txt"))
    cleaning = Pipeline([Node(lambda *files: None, list(files), "prompts", name="clean_prompts")])
    assert _most_prompts(cleaning, catalog) == counts
