"""Prompts of Hugging Face datasets in local folders, read by the real library; nothing leaves this machine."""

from importlib import util

import pytest
from tests.raising import refuses

import datasets
from dpdmd_pipeline.datasets.prompt_file import PromptFileDataset
from dpdmd_pipeline.pipelines.prompts.cleaning import split_by_hash, survey

TEXTS = ["a red circle", None, " \u200b", 'a "blue" square, big', "a red circle"]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset in parquet files by split, as on the hub, and saved by `save_to_disk` with and without splits."""
    folder = tmp_path_factory.mktemp("hub")
    rows = datasets.Dataset.from_dict({"id": range(len(TEXTS)), "caption": TEXTS})
    rows.to_parquet(folder / "hub/data/train-00000-of-00001.parquet")
    rows.save_to_disk(folder / "rows")
    datasets.DatasetDict({"train": rows, "test": rows.select([3])}).save_to_disk(folder / "splits")
    return folder


def prompts(url: str):
    return PromptFileDataset(filepath=url).load()


@pytest.mark.parametrize(
    "path", ["hub", "hub?split=train&column=caption", "rows", "splits", "splits?split=train", "hub?config=default"]
)
def test_a_dataset_gives_the_prompts_of_its_column_again_and_again(folder, path):
    source = prompts(f"hf://{folder}/{path}")
    for _ in range(2):
        assert [(line.number, line.text) for line in source.lines()] == [
            (1, TEXTS[0]),
            (2, ""),
            (3, ""),
            (4, TEXTS[3]),
            (5, TEXTS[0]),
        ]


def test_a_split_is_chosen_by_its_name(folder):
    assert [line.text for line in prompts(f"hf://{folder}/splits?split=test").lines()] == [TEXTS[3]]


def test_the_prompts_stage_reads_a_dataset_like_a_file(folder):
    result = survey(prompts(f"hf://{folder}/hub"))
    assert result.report()["file"] == "hub" and result.report()["empty"] == 2 and result.report()["repeated"] == 1
    assert {record["text"] for record in split_by_hash(result, 0.5)} == {TEXTS[0], TEXTS[3]}


@pytest.mark.parametrize(
    ("path", "facts"),
    [
        ("hub?column=prompt", ["'prompt'", "id, caption"]),
        ("hub?column=", ["''", "id, caption"]),
        ("hub?column=id", ["row 1", "string", "0"]),
        ("hub?split=test", ["test", "train"]),
        ("hub?config=other", ["other", "default"]),
        ("splits?split=dev", ["dev"]),
        ("nothing", ["nothing"]),
        ("hub?name=x", ["unknown name", "column"]),
    ],
)
def test_a_dataset_that_cannot_be_read_is_refused_in_one_line(folder, path, facts):
    url = f"hf://{folder}/{path}"
    with refuses(ValueError, url, *facts) as error:
        list(prompts(url).lines())
    assert "\n" not in str(error.value)


def test_a_dataset_without_a_column_of_prompts_names_what_it_has(tmp_path):
    datasets.Dataset.from_dict({"words": ["a cat"]}).save_to_disk(tmp_path / "rows")
    with refuses(ValueError, "hf://", "text, prompt, caption", "'words'"):
        list(prompts(f"hf://{tmp_path}/rows").lines())


def test_without_a_network_an_id_of_the_hub_is_refused_in_one_line():
    with refuses(ValueError, "hf://nobody/nothing", "network"):
        list(prompts("hf://nobody/nothing").lines())


def test_without_the_library_its_installation_is_named(monkeypatch):
    monkeypatch.setattr("dpdmd_pipeline.datasets.hub_prompts.find_spec", lambda name: util.find_spec(f"no_{name}"))
    with refuses(ValueError, "hf://a/b", "`pip install datasets`"):
        list(prompts("hf://a/b").lines())
