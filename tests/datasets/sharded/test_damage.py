"""Damaged and foreign caches are refused by name, and the same command repairs them."""

import json
import os
from pathlib import Path

import pytest
import torch
from kedro.io import DatasetError
from tests.datasets.sharded.caches import NUM_SHARDS, contents, lazy_shards, save_counted, truncate
from tests.raising import refuses

from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset, files
from dpdmd_pipeline.publishing import sha256


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def refusal(dataset: ShardedDataset, error: type[Exception] = ValueError) -> str:
    """Message of an error while loading: one line."""
    with pytest.raises(DatasetError) as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, error)
    assert "\n" not in str(caught.value.__cause__)
    return str(caught.value.__cause__)


def test_a_truncated_shard_is_refused_with_its_sizes_and_a_remedy_and_the_same_command_repairs_it(
    dataset, folder, whole, caplog
):
    dataset.save(lazy_shards())
    size = (folder / "00002.safetensors").stat().st_size
    truncate(folder / "00002.safetensors")
    text = refusal(dataset)
    assert {f"{folder}/00002.safetensors", "40"} < set(text.split()) and str(size) in text
    assert "run the stage" in text and f"delete {folder}" in text
    assert save_counted(dataset) == [2]
    assert "repairing" in caplog.text
    assert contents(folder) == whole


def test_a_missing_shard_is_refused_and_repaired(dataset, folder, whole):
    dataset.save(lazy_shards())
    (folder / "00005.safetensors").unlink()
    assert "00005.safetensors" in refusal(dataset)
    assert (save_counted(dataset), contents(folder)) == ([5], whole)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"version": 1}'], ids=repr)
def test_a_missing_or_unreadable_manifest_is_refused_and_repaired_from_the_shards(dataset, folder, whole, text):
    dataset.save(lazy_shards())
    (folder / "manifest.json").unlink() if text is None else (folder / "manifest.json").write_text(text)
    assert "manifest.json" in refusal(dataset)
    assert (save_counted(dataset), contents(folder)) == ([], whole)


def test_a_shard_of_another_cache_is_refused(dataset, folder, tmp_path):
    dataset.save(lazy_shards())
    ShardedDataset(filepath=str(tmp_path / "other")).save(lazy_shards(seed=1))
    os.replace(tmp_path / "other" / "00001.safetensors", folder / "00001.safetensors")
    text = refusal(dataset)
    assert "00001.safetensors" in text and "another cache" in text


def test_repairing_also_rewrites_a_shard_of_the_right_size_and_wrong_content(dataset, folder, whole):
    dataset.save(lazy_shards())
    flip_last_byte(folder / "00000.safetensors")
    (folder / "00004.safetensors").unlink()
    assert (save_counted(dataset), contents(folder)) == ([0, 4], whole)


@pytest.mark.parametrize("read", [lambda cache: cache.rows([13]), lambda cache: list(cache.shards())])
def test_a_flipped_byte_is_named_by_its_first_reader_and_the_same_command_repairs_it(
    dataset, folder, whole, caplog, read
):
    dataset.save(lazy_shards())
    flip_last_byte(folder / "00004.safetensors")
    cache = dataset.load()
    assert cache.rows([0, 12])["prompt"].tolist() == [0, 34]  # other shards can be read
    with refuses(ValueError, str(folder / "00004.safetensors"), "SHA-256", "run the stage"):
        read(cache)
    assert save_counted(dataset) == [4]
    assert "00004.safetensors" in caplog.text and "repairing" in caplog.text
    assert contents(folder) == whole


def test_a_shard_is_hashed_once_by_a_process_until_it_changes(dataset, folder, monkeypatch):
    dataset.save(lazy_shards())
    hashed = []
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.stem) or sha256(path))
    for _ in range(2):
        cache = dataset.load()
        cache.rows([0, 4])
        assert list(cache.shards()) and hashed == ["00000", "00001", "00002", "00003", "00004", "00005"]
    os.utime(folder / "00001.safetensors")
    assert save_counted(dataset) == [] and hashed[NUM_SHARDS:] == ["00001"]


def test_a_cache_without_checksums_is_read_and_reused(dataset, folder):
    dataset.save(lazy_shards())
    record = json.loads((folder / "manifest.json").read_text())
    for shard in record["shards"]:
        del shard["sha256"]
    (folder / "manifest.json").write_text(json.dumps(record))
    assert len(list(dataset.load().shards())) == NUM_SHARDS
    assert save_counted(dataset) == []
    (folder / "00003.safetensors").unlink()
    assert save_counted(dataset) == [3]


def test_damage_after_loading_is_reported(dataset, folder):
    dataset.save(lazy_shards())
    cache = dataset.load()
    truncate(folder / "00000.safetensors")
    with refuses(ValueError, "00000.safetensors was damaged"):
        cache.rows([0])
    dataset.save(lazy_shards(seed=1))
    with refuses(ValueError, "another cache"):
        cache.rows([18])


def test_a_manifest_of_another_version_is_neither_read_nor_overwritten(dataset, folder):
    dataset.save(lazy_shards())
    record = json.loads((folder / "manifest.json").read_text()) | {"version": 2}
    (folder / "manifest.json").write_text(json.dumps(record))
    text = refusal(dataset)
    assert "version 2" in text and "version 1" in text
    with refuses(DatasetError, "version 2"):
        dataset.save(lazy_shards())
    assert len(contents(folder)) == NUM_SHARDS + 1


def test_a_folder_that_is_no_cache_is_never_deleted(dataset, folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with refuses(DatasetError, "thesis.txt"):
        dataset.save(lazy_shards())
    assert (folder / "thesis.txt").exists()


def test_a_missing_cache_is_refused_with_its_path_and_the_remedy(dataset, folder):
    text = refusal(dataset, FileNotFoundError)
    assert str(folder) in text and "run the stage" in text


# ---- nodes


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ({"a": lambda: {"x": torch.zeros(2), "y": torch.zeros(3)}}, r"\[2\].*\[3\]"),
        ({"a": lambda: {"x": torch.tensor(1.0)}}, r"shard a .*\[\]"),
        ({"a": dict}, "shard a .*{}"),
        ({"a": lambda: {"x": torch.zeros(2)}, "b": lambda: {"x": torch.zeros(2).half()}}, "float16.*float32"),
        ({"a": lambda: {"x": torch.zeros(2)}, "b": lambda: {"y": torch.zeros(2)}}, "shard b"),
        ({"a": lambda: {"x": torch.zeros(2, dtype=torch.complex128)}}, "x .*complex128"),
        ({"../a": lambda: 1 / 0}, r"\.\./a"),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(dataset, shards, reason):
    with pytest.raises(DatasetError, match=reason) as error:
        dataset.save(LazyShards(shards, "f", {}))
    assert isinstance(error.value.__cause__, ValueError)
    assert not dataset.exists()


def test_a_manifest_that_is_not_json_is_refused_before_the_first_shard(dataset):
    with refuses(DatasetError, "PosixPath") as error:
        dataset.save(LazyShards({"a": lambda: 1 / 0}, "f", {"path": Path("x")}))
    assert isinstance(error.value.__cause__, ValueError)


def test_other_types_than_lazy_shards_are_refused(dataset):
    with refuses(DatasetError, "dict") as error:
        dataset.save({"x": torch.zeros(1)})
    assert isinstance(error.value.__cause__, ValueError)
