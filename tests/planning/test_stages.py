"""Costs of stages in words and counts; tests/pipelines/train/test_environments.py holds them to whole runs."""

import os
from types import SimpleNamespace

import pytest
import torch
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Node, Pipeline
from kedro.runner import SequentialRunner
from tests.pipelines.conftest import ONE, anchor_options, backbone_options, train_options
from tests.raising import refuses

from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
from dpdmd_pipeline.errors import StageError
from dpdmd_pipeline.pipelines import anchors, prompts
from dpdmd_pipeline.pipelines.prompts.options import PromptsOptions
from dpdmd_pipeline.planning.cost import Passes, anchored_prompts
from dpdmd_pipeline.planning.disk import _remedies, log_export_memory
from dpdmd_pipeline.planning.memory import GIB
from dpdmd_pipeline.planning.plan import Counts, Plan, _check_draws, _most_prompts, _written_prompts
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
    catalog = raw_files(tmp_path, options)
    cleaning = Pipeline([Node(lambda *files: None, list(RAW), "prompts", name="clean_prompts")])
    assert _most_prompts(cleaning, catalog) == counts


RAW = {"raw_prompts": "a\nb\n\nc\nd\n", "raw_eval_prompts": "e\nf\n"}


def raw_files(folder, options) -> DataCatalog:
    catalog = DataCatalog({"params:prompts": MemoryDataset(options)})
    for name, text in RAW.items():
        (folder / f"{name}.txt").write_text(text)
        os.utime(folder / f"{name}.txt", (0, 0))
        catalog[name] = PromptFileDataset(filepath=str(folder / f"{name}.txt"))
    catalog["prompts"] = PromptFileDataset(filepath=str(folder / "prompts.jsonl"))
    catalog["prompts_report"] = MemoryDataset()
    return catalog


def test_prompts_on_the_disk_count_only_if_they_are_this_runs_choice(tmp_path):
    line, all_of_them = prompts.create_pipeline(), {"take": None, "seed": 0, "eval_share": None}
    catalog = raw_files(tmp_path, all_of_them)
    others = {"batch_size": 1, "shard_size": 1, "device": "cpu", "launch": ONE}
    catalog["params:prompts"] = MemoryDataset(PromptsOptions(**all_of_them, **others))
    SequentialRunner().run(line.only_nodes("clean_prompts"), catalog)
    assert _written_prompts(line, catalog).counts == (6, 4, 2)
    for other in ({"take": 3}, {"seed": 1}, {"eval_share": 0.5}):
        catalog["params:prompts"] = MemoryDataset(all_of_them | other)
        assert _written_prompts(line, catalog) is None
        assert _written_prompts(anchors.create_pipeline(), catalog).counts == (6, 4, 2)  # not cleaned by this run


def test_the_host_memory_of_an_export_is_told_and_few_drawn_prompts_are_the_remedy_for_a_disk(tiny_teacher, caplog):
    options = train_options(max_steps=4, batch_size=2)
    plan = Plan(
        *(tiny_teacher, backbone_options(), anchor_options(), {}),
        prompts=Counts(1000, 990, 10),
        train=options,
        exported=(["diffusers"], "bfloat16"),
        is_pretrained=True,
    )
    with caplog.at_level("INFO"):
        log_export_memory(plan)
    numbers = sum(weight.numel() for weight in plan.model.empty_model().parameters())
    assert f"{6 * numbers / GIB:.1f} GiB" in caplog.text and "host memory" in caplog.text
    remedies = _remedies(plan, {"embeddings": 100 * GIB})
    assert "prompts.take=8," in remedies and "98.2 GiB" in remedies
