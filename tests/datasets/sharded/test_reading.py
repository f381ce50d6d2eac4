"""A saved cache gives back its rows."""

import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kedro.io import DataCatalog
from tests.datasets.sharded.caches import NUM_SHARDS, ROWS, lazy_shards, load_all, make_shard
from tests.raising import refuses

from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, ShardedDataset, ShardedTensors, fingerprint


def test_a_cache_gives_back_its_tensors_facts_and_dtypes(dataset):
    dataset.save(lazy_shards())
    cache = dataset.load()
    expected = [make_shard(number) for number in range(NUM_SHARDS)]
    assert (len(cache), cache.manifest, cache.fingerprint) == (sum(ROWS), {"seed": 0}, fingerprint("test", 0))
    for name, tensor in load_all(dataset).items():
        assert tensor.dtype == expected[0][name].dtype
        assert torch.equal(tensor, torch.cat([shard[name] for shard in expected]))


def test_the_manifest_describes_the_shards(dataset, folder):
    dataset.save(lazy_shards())
    record = json.loads((folder / "manifest.json").read_text())
    assert record["tensors"]["anchor_0"] == {"dtype": "bfloat16", "shape": [3, 2]}
    assert [shard["rows"] for shard in record["shards"]] == list(ROWS)
    assert [shard["bytes"] for shard in record["shards"]] == [
        (folder / f"{shard['name']}.safetensors").stat().st_size for shard in record["shards"]
    ]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory) -> tuple[ShardedTensors, dict[str, torch.Tensor]]:
    dataset = ShardedDataset(filepath=str(tmp_path_factory.mktemp("rows") / "anchors"))
    dataset.save(lazy_shards())
    return dataset.load(), load_all(dataset)


@given(indices=st.lists(st.integers(0, sum(ROWS) - 1), max_size=30))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_equal_fancy_indexing_of_the_concatenation(loaded, indices):
    cache, everything = loaded
    rows = cache.rows(indices)
    assert rows.keys() == everything.keys()
    for name, tensor in rows.items():
        expected = everything[name][torch.tensor(indices, dtype=torch.int64)]
        assert tensor.dtype == expected.dtype
        assert torch.equal(tensor, expected)


def test_rows_takes_a_tensor_of_indices(loaded):
    cache, everything = loaded
    indices = torch.tensor([7, 0, 7])
    assert torch.equal(cache.rows(indices)["anchor_0"], everything["anchor_0"][indices])


@pytest.mark.parametrize("index", [-1, sum(ROWS), 10**12])
def test_a_row_outside_the_cache_is_refused_with_the_number_of_rows(loaded, index):
    with pytest.raises(IndexError) as error:
        loaded[0].rows([0, index])
    assert {"row", str(index), str(sum(ROWS))} < set(str(error.value).split()) and "anchors" in str(error.value)


def test_writing_into_loaded_tensors_does_not_change_later_reads(dataset):
    dataset.save(lazy_shards())
    cache = dataset.load()
    before = cache.rows(range(len(cache)))
    for shard in cache.shards():
        shard["anchor_0"].zero_()
    cache.rows([0, 1])["anchor_0"].zero_()
    for name, tensor in cache.rows(range(len(cache))).items():
        assert torch.equal(tensor, before[name])


def test_a_loaded_cache_can_be_sent_to_another_process(loaded):
    cache, everything = loaded
    cache.rows([0])
    copy = pickle.loads(pickle.dumps(cache))
    assert torch.equal(copy.rows([3])["image"], everything["image"][[3]])


def test_tensors_that_share_memory_can_be_saved(dataset):
    stacked = torch.randn(2, 4, 3)
    shard = {"anchor_0": stacked[0], "anchor_1": stacked[1], "same": stacked[1], "turned": stacked[0].T.flip(0).T}
    dataset.save(LazyShards({"0": lambda: shard}, "shared", {}))
    for name, tensor in dataset.load().rows(range(4)).items():
        assert torch.equal(tensor, shard[name])


def test_a_cache_without_shards_has_its_manifest(dataset):
    dataset.save(LazyShards({}, "empty", {"why": "no prompts"}))
    cache = dataset.load()
    assert (len(cache), cache.manifest, cache.rows([]), list(cache.shards())) == (0, {"why": "no prompts"}, {}, [])
    with refuses(IndexError, "0 rows"):
        cache.rows([0])


def test_a_shard_without_rows_keeps_its_position(dataset):
    dataset.save(LazyShards({"a": lambda: {"x": torch.zeros(0, 2)}, "b": lambda: {"x": torch.ones(3, 2)}}, "f", {}))
    assert torch.equal(dataset.load().rows([2, 0])["x"], torch.ones(2, 2))


def test_it_works_through_a_kedro_catalog(folder):
    config = {"anchors": {"type": "dpdmd_pipeline.datasets.sharded.ShardedDataset", "filepath": str(folder)}}
    catalog = DataCatalog.from_config(config)
    assert not catalog.exists("anchors")
    catalog.save("anchors", lazy_shards())
    assert catalog.exists("anchors")
    assert len(catalog.load("anchors")) == sum(ROWS)


def test_the_module_does_not_load_torch():
    code = "import sys; from dpdmd_pipeline.datasets import model_folder, sharded; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


# ---- fingerprints


def test_a_fingerprint_ignores_the_order_of_keys_and_nothing_else():
    assert fingerprint({"a": 1, "b": [2.5, None]}) == fingerprint({"b": [2.5, None], "a": 1})
    different = [fingerprint(*parts) for parts in [(1, 2), (2, 1), ([1, 2],), ("1", 2), (1,), (1.5, 2), ()]]
    assert len(set(different)) == len(different)


def test_a_fingerprint_is_the_same_on_every_machine():
    # SHA-256 of the text ["\\u00e9", {"k": 5}, 0.1]
    assert fingerprint("é", {"k": 5}, 0.1) == "ba95753db3941df1d2a37807f679340b1a57f323213cb8ec81df9459943c5a61"


@pytest.mark.parametrize("part", [Path("x"), {1, 2}, float("nan"), torch.zeros(1)], ids=type)
def test_a_fingerprint_refuses_values_that_are_not_json(part):
    with refuses(ValueError, "fingerprint"):
        fingerprint(part)


# ---- values that thunks share


def test_the_last_value_is_loaded_once_per_key_and_stays_with_its_process():
    loads: list[str] = []
    load = LastLoaded(lambda key: loads.append(key) or [key])
    assert load("a") is load("a") and load("b") == ["b"] and load("a") == ["a"]
    assert loads == ["a", "b", "a"]
    load = LastLoaded(partial(make_shard, 0))
    load()
    assert len(pickle.dumps(load)) < 200
    assert torch.equal(pickle.loads(pickle.dumps(load))()["prompt"], load()["prompt"])
