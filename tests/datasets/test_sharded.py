import errno
import json
import logging
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kedro.io import DataCatalog, DatasetError

from dpdmd_pipeline.datasets import sharded
from dpdmd_pipeline.datasets.sharded import LastLoaded, LazyShards, ShardedDataset, ShardedTensors, fingerprint
from dpdmd_pipeline.publishing import Folders, locked, publish, recover, writing
from dpdmd_pipeline.training.launch_options import LaunchOptions

NUM_SHARDS = 6
ROWS = (4, 1, 3, 5, 2, 4)


def make_shard(number: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * seed + number)
    return {
        "anchor_0": torch.randn(ROWS[number], 3, 2, generator=generator).bfloat16(),
        "prompt": torch.arange(ROWS[number]) + 10 * number,
        "image": torch.randint(0, 256, (ROWS[number], 2), generator=generator, dtype=torch.uint8),
    }


def lazy_shards(seed: int = 0, calls: list[int] | None = None, names: list[str] | None = None) -> LazyShards:
    calls = [] if calls is None else calls

    def thunk(number: int):
        return lambda: calls.append(number) or make_shard(number, seed)

    names = names or [f"{number:05d}" for number in range(NUM_SHARDS)]
    shards = {name: thunk(number) for number, name in enumerate(names)}
    return LazyShards(shards, fingerprint("test", seed), {"seed": seed})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "anchors"


@pytest.fixture
def dataset(folder: Path) -> ShardedDataset:
    return ShardedDataset(filepath=str(folder))


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, bytes]:
    """The files of a cache that was written without interruption."""
    ShardedDataset(filepath=str(tmp_path / "whole")).save(lazy_shards())
    return contents(tmp_path / "whole")


def load_all(dataset: ShardedDataset) -> dict[str, torch.Tensor]:
    parts = list(dataset.load().shards())
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# ---- what is saved is loaded


def test_a_cache_gives_back_its_tensors_facts_and_dtypes(dataset):
    dataset.save(lazy_shards())
    cache = dataset.load()
    expected = [make_shard(number) for number in range(NUM_SHARDS)]
    assert (len(cache), cache.manifest, cache.fingerprint) == (sum(ROWS), {"seed": 0}, fingerprint("test", 0))
    for name, tensor in load_all(dataset).items():
        assert tensor.dtype == expected[0][name].dtype
        assert torch.equal(tensor, torch.cat([part[name] for part in expected]))


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
    with pytest.raises(IndexError, match=f"row {index} of .*anchors, which has {sum(ROWS)} rows"):
        loaded[0].rows([0, index])


def test_writing_into_what_was_read_changes_nothing_that_is_read_later(dataset):
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


def test_a_cache_without_shards_holds_its_manifest(dataset):
    dataset.save(LazyShards({}, "empty", {"why": "no prompts"}))
    cache = dataset.load()
    assert (len(cache), cache.manifest, cache.rows([]), list(cache.shards())) == (0, {"why": "no prompts"}, {}, [])
    with pytest.raises(IndexError, match="has 0 rows"):
        cache.rows([0])


def test_a_shard_without_rows_is_kept_in_place(dataset):
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
def test_a_fingerprint_refuses_what_is_not_json(part):
    with pytest.raises(ValueError, match="cannot fingerprint"):
        fingerprint(part)


# ---- reuse


def test_a_whole_cache_is_reused_without_calling_a_thunk(dataset, folder, caplog):
    dataset.save(lazy_shards())
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    calls: list[int] = []
    caplog.clear()  # Kedro, if it was imported before, lets this package's lines through at any level
    with caplog.at_level(logging.INFO, logger="dpdmd_pipeline.datasets.sharded"):
        dataset.save(lazy_shards(calls=calls))
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert caplog.messages == [f"anchors: reused ({NUM_SHARDS} shards)"]


@pytest.mark.parametrize("other", [{"seed": 1}, {"names": [f"x{number}" for number in range(NUM_SHARDS)]}], ids=str)
def test_another_fingerprint_or_other_shards_replace_the_cache_and_leave_nothing_behind(dataset, folder, other):
    dataset.save(lazy_shards())
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls, **other))
    assert calls == list(range(NUM_SHARDS))
    assert dataset.load().manifest == {"seed": other.get("seed", 0)}
    assert sorted(path.name for path in folder.parent.iterdir()) == [".anchors.lock", "anchors"]
    assert len(list(folder.iterdir())) == NUM_SHARDS + 1


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "big_disk").mkdir()
    link = tmp_path / "anchors"
    link.symlink_to(tmp_path / "big_disk" / "anchors")
    dataset = ShardedDataset(filepath=str(link))
    for seed in (0, 1):
        dataset.save(lazy_shards(seed))
        assert dataset.load().manifest == {"seed": seed}
    assert link.is_symlink()


# ---- interruptions


def write_until(dataset: ShardedDataset, number: int) -> None:
    """Write the cache with a thunk that fails at shard `number`."""
    data = lazy_shards()
    with pytest.raises(DatasetError) as caught:
        shards = dict(data.shards) | {f"{number:05d}": lambda: 1 / 0}
        dataset.save(LazyShards(shards, data.fingerprint, data.manifest))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


KILLER = textwrap.dedent(
    """
    import os, random, signal, sys, time
    from pathlib import Path
    sys.path.insert(0, sys.argv[2])
    import safetensors.torch
    from test_sharded import lazy_shards
    from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
    dataset, data = ShardedDataset(filepath=sys.argv[1]), lazy_shards()

    def run_and_kill(stop_at, delay):
        here, there = os.pipe()
        child = os.fork()
        if child == 0:
            def call(number, thunk):
                if number == stop_at:
                    os.write(there, b"here")
                    time.sleep(60)
                return thunk()
            shards = {
                name: lambda number=number, thunk=thunk: call(number, thunk)
                for number, (name, thunk) in enumerate(data.shards.items())
            }
            if stop_at is None:
                os.write(there, b"here")
            dataset.save(LazyShards(shards, data.fingerprint, data.manifest))
            os._exit(0)
        os.read(here, 4)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    if sys.argv[3] == "shards":
        for stop_at in range(len(data.shards)):
            run_and_kill(stop_at, 0)
            kept = len(list(Path(sys.argv[1]).with_name(".anchors.partial").glob("*.safetensors")))
            assert (kept, dataset.exists()) == (stop_at, False), (kept, stop_at)
    else:
        start = time.perf_counter()
        ShardedDataset(filepath=sys.argv[1] + "_uninterrupted").save(data)
        duration = time.perf_counter() - start
        for _ in range(12):
            run_and_kill(None, random.uniform(0, 4 * duration))
    """
)


def kill_writers(folder: Path, where: str) -> None:
    """Start the same writer again and again, each killed with SIGKILL."""
    subprocess.run([sys.executable, "-c", KILLER, str(folder), str(Path(__file__).parent), where], check=True)


def test_killed_at_every_shard_the_same_command_continues_to_the_same_bytes(dataset, folder, whole):
    kill_writers(folder, "shards")  # each gets one shard further than the one before
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls == [NUM_SHARDS - 1]
    assert contents(folder) == whole


def test_killed_at_random_moments_the_same_command_ends_with_the_same_bytes(dataset, folder, whole):
    kill_writers(folder, "random moments")
    dataset.save(lazy_shards())
    assert contents(folder) == whole
    assert not any(path.exists() for path in (Folders.of(folder).partial, Folders.of(folder).ready))


def interrupt_at(moment: int, monkeypatch) -> None:
    """Let the process die (an exception nothing catches) at the n-th change of the disk."""
    left = iter(range(moment, -1, -1))

    class Killed(BaseException):
        pass

    def counted(change):
        def call(*arguments, **options):
            if next(left) == 0:
                raise Killed
            return change(*arguments, **options)

        return call

    monkeypatch.setattr(os, "replace", counted(os.replace))
    monkeypatch.setattr(Path, "rename", counted(Path.rename))
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))


@pytest.mark.parametrize("before", [None, "another cache", "damaged"])
def test_killed_between_any_two_changes_of_the_disk_a_whole_cache_can_be_had(
    tmp_path, dataset, folder, whole, before, monkeypatch
):
    changes = 0
    while True:
        if before:
            dataset.save(lazy_shards(seed=1 if before == "another cache" else 0))
        if before == "damaged":
            truncate(folder / "00002.safetensors")
        with monkeypatch.context() as patch:
            interrupt_at(changes, patch)
            try:
                dataset.save(lazy_shards())
                break
            except BaseException as error:  # noqa: BLE001
                assert type(error).__name__ == "Killed"  # noqa: PT017
        if before == "another cache":
            assert dataset.load().manifest["seed"] in (0, 1)  # one of the two can always be loaded
        dataset.save(lazy_shards())
        assert contents(folder) == whole
        assert sorted(path.name for path in folder.parent.iterdir()) == [".anchors.lock", "anchors"]
        shutil.rmtree(folder)
        changes += 1
    assert changes >= (4 if before == "damaged" else NUM_SHARDS + 2)


def test_a_cache_killed_while_published_is_recovered_by_loading(dataset, folder):
    dataset.save(lazy_shards())
    folder.rename(Folders.of(folder).ready)
    Folders.of(folder).old.mkdir()
    assert dataset.exists()
    assert dataset.load().manifest == {"seed": 0}
    assert sorted(path.name for path in folder.parent.iterdir()) == [".anchors.lock", "anchors"]


def test_recover_takes_the_new_folder_over_the_old(tmp_path):
    folders = Folders.of(tmp_path / "thing")
    for folder, text in ((folders.published, "one before"), (folders.ready, "new"), (folders.old, "oldest")):
        folder.mkdir()
        (folder / "file").write_text(text)
    recover(folders)
    assert (folders.published / "file").read_text() == "new"
    assert not folders.old.exists()


def test_shards_of_another_fingerprint_are_not_taken_over(dataset, folder, whole):
    write_until(dataset, 3)
    (Folders.of(folder).partial / "00007.safetensors.tmp").write_bytes(b"half a shard")
    calls: list[int] = []
    dataset.save(lazy_shards(seed=1, calls=calls))
    assert calls == list(range(NUM_SHARDS))
    assert not Folders.of(folder).partial.exists()
    assert set(contents(folder)) == set(whole)


def test_a_truncated_shard_in_the_making_is_written_again(dataset, folder, whole):
    write_until(dataset, 4)
    truncate(Folders.of(folder).partial / "00001.safetensors")
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls == [1, 4, 5]
    assert contents(folder) == whole


def test_a_failing_thunk_keeps_the_shards_before_it(dataset):
    write_until(dataset, 3)
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls == [3, 4, 5]


def test_progress_is_logged_shard_by_shard(dataset, caplog):
    write_until(dataset, 1)
    caplog.clear()  # Kedro, if it was imported before, lets this package's lines through at any level
    with caplog.at_level(logging.INFO, logger="dpdmd_pipeline.datasets.sharded"):
        dataset.save(lazy_shards())
    assert caplog.messages[:2] == ["anchors: shard 1 of 6 kept (4 rows)", "anchors: shard 2 of 6 written (1 rows)"]


# ---- damage


def truncate(path: Path, size: int = 40) -> None:
    with path.open("r+b") as file:
        file.truncate(size)


def flip_last_byte(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def refusal(dataset: ShardedDataset) -> str:
    with pytest.raises(DatasetError) as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, ValueError)
    assert "\n" not in str(caught.value.__cause__)
    return str(caught.value.__cause__)


def test_a_truncated_shard_is_refused_with_its_sizes_and_a_remedy_and_the_same_command_repairs_it(
    dataset, folder, whole, caplog
):
    dataset.save(lazy_shards())
    size = (folder / "00002.safetensors").stat().st_size
    truncate(folder / "00002.safetensors")
    text = refusal(dataset)
    assert f"{folder}/00002.safetensors has 40 bytes, expected {size}" in text
    assert "run the stage that writes it again" in text
    assert f"delete {folder}" in text
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls == [2]
    assert "repairing" in caplog.text
    assert contents(folder) == whole


def test_a_missing_shard_is_refused_and_repaired(dataset, folder, whole):
    dataset.save(lazy_shards())
    (folder / "00005.safetensors").unlink()
    assert "00005.safetensors is missing, expected" in refusal(dataset)
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert (calls, contents(folder)) == ([5], whole)


@pytest.mark.parametrize("text", [None, "", "{", "[]", '{"version": 1}'], ids=repr)
def test_a_missing_or_unreadable_manifest_is_refused_and_repaired_from_the_shards(dataset, folder, whole, text):
    dataset.save(lazy_shards())
    (folder / "manifest.json").unlink() if text is None else (folder / "manifest.json").write_text(text)
    assert "manifest.json is missing or unreadable" in refusal(dataset)
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert (calls, contents(folder)) == ([], whole)


def test_a_shard_of_another_cache_is_refused(dataset, folder, tmp_path):
    dataset.save(lazy_shards())
    ShardedDataset(filepath=str(tmp_path / "other")).save(lazy_shards(seed=1))
    os.replace(tmp_path / "other" / "00001.safetensors", folder / "00001.safetensors")
    assert "00001.safetensors belongs to another cache" in refusal(dataset)


def test_repairing_also_rewrites_a_shard_of_the_right_size_and_wrong_content(dataset, folder, whole):
    dataset.save(lazy_shards())
    flip_last_byte(folder / "00000.safetensors")
    (folder / "00004.safetensors").unlink()
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert (calls, contents(folder)) == ([0, 4], whole)


def test_damage_after_loading_is_reported(dataset, folder):
    dataset.save(lazy_shards())
    cache = dataset.load()
    truncate(folder / "00000.safetensors")
    with pytest.raises(ValueError, match="00000.safetensors was damaged since it was loaded"):
        cache.rows([0])
    dataset.save(lazy_shards(seed=1))
    with pytest.raises(ValueError, match="was replaced by another cache"):
        cache.rows([18])


def test_a_manifest_of_another_version_is_neither_read_nor_overwritten(dataset, folder):
    dataset.save(lazy_shards())
    record = json.loads((folder / "manifest.json").read_text()) | {"version": 2}
    (folder / "manifest.json").write_text(json.dumps(record))
    assert "has version 2, this program reads version 1" in refusal(dataset)
    with pytest.raises(DatasetError, match="has version 2, this program reads version 1"):
        dataset.save(lazy_shards())
    assert len(contents(folder)) == NUM_SHARDS + 1


def test_a_folder_that_is_no_cache_is_never_deleted(dataset, folder):
    folder.mkdir(parents=True)
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(DatasetError, match="is not a cache .*'thesis.txt'.*move it away"):
        dataset.save(lazy_shards())
    assert (folder / "thesis.txt").exists()


def test_a_cache_that_does_not_exist_names_the_path_and_the_remedy(dataset, folder):
    with pytest.raises(DatasetError, match=f"{folder} does not exist: run the stage that writes it first"):
        dataset.load()


# ---- what a node may not return


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ({"a": lambda: {"x": torch.zeros(2), "y": torch.zeros(3)}}, "one number of rows"),
        ({"a": lambda: {"x": torch.tensor(1.0)}}, "one number of rows"),
        ({"a": dict}, "one number of rows"),
        ({"a": lambda: {"x": torch.zeros(2)}, "b": lambda: {"x": torch.zeros(2).half()}}, "float16.*float32"),
        ({"a": lambda: {"x": torch.zeros(2)}, "b": lambda: {"y": torch.zeros(2)}}, "shard b"),
        ({"a": lambda: {"x": torch.zeros(2, dtype=torch.complex128)}}, "complex128, which cannot be stored"),
        ({"../a": lambda: 1 / 0}, "plain file name"),
    ],
)
def test_shards_that_do_not_fit_together_are_refused(dataset, shards, reason):
    with pytest.raises(DatasetError, match=reason):
        dataset.save(LazyShards(shards, "f", {}))
    assert not dataset.exists()


def test_a_manifest_that_is_not_json_is_refused_before_the_first_shard(dataset):
    with pytest.raises(DatasetError, match="cannot fingerprint"):
        dataset.save(LazyShards({"a": lambda: 1 / 0}, "f", {"path": Path("x")}))


def test_anything_but_lazy_shards_is_refused(dataset):
    with pytest.raises(DatasetError, match="saves LazyShards, it was given dict"):
        dataset.save({"x": torch.zeros(1)})


# ---- other processes, full and closed disks


def test_a_second_writer_is_refused_with_the_number_of_the_first(dataset, folder, whole):
    code = textwrap.dedent(
        """
        import sys, time
        from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
        def wait():
            print("here", flush=True)
            time.sleep(60)
        ShardedDataset(filepath=sys.argv[1]).save(LazyShards({"a": wait}, "f", {}))
        """
    )
    with subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"
        with pytest.raises(DatasetError, match=f"{folder} is being written by process {process.pid}: wait"):
            dataset.save(lazy_shards())
        process.kill()
    dataset.save(lazy_shards())
    assert contents(folder) == whole


def test_a_lock_is_let_go_when_its_block_ends(folder):
    for _ in range(2):
        with locked(Folders.of(folder)):
            pass


def test_a_file_too_big_for_the_disk_names_path_and_remedy_and_keeps_finished_shards(folder, tmp_path):
    code = textwrap.dedent(
        """
        import resource, sys, torch
        from dpdmd_pipeline.datasets.sharded import LazyShards, ShardedDataset
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        shards = {"a": lambda: {"x": torch.zeros(100)}, "b": lambda: {"x": torch.zeros(100_000)}}
        try:
            ShardedDataset(filepath=sys.argv[1]).save(LazyShards(shards, "f", {}))
        except Exception as error:
            print(type(error.__cause__).__name__, error.__cause__, sep="|")
        """
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    kind, text = result.stdout.strip().split("|")
    assert kind == "OSError"
    assert "File too large" in text
    assert "what is finished is kept" in text
    assert str(Folders.of(folder).partial / "b.safetensors") in text
    assert [path.name for path in Folders.of(folder).partial.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EACCES, "make the folder writable"), (errno.EROFS, "mounted read-only"), (errno.ENOSPC, "free some space")],
)
def test_an_error_of_the_system_names_the_path_and_a_remedy(number, remedy):
    with (
        pytest.raises(OSError, match=f"{os.strerror(number)}.*{remedy}.*'/data/anchors'") as caught,
        writing(Path("/data/anchors")),
    ):
        raise OSError(number, os.strerror(number))
    assert caught.value.errno == number


def test_publishing_needs_no_old_folder(tmp_path):
    folders = Folders.of(tmp_path / "thing")
    folders.partial.mkdir()
    publish(folders)
    assert folders.published.is_dir()


# ---- many processes


def made_by_two(shards: dict | None = None, machines: int = 1, rendezvous: str | None = None) -> LazyShards:
    """The cache of `lazy_shards`, by two processes; each notes in its folder which shards it makes."""
    whole = lazy_shards()
    launch = LaunchOptions(processes=2 // machines, machines=machines, rendezvous=rendezvous)
    made = {name: partial(make_shard, number) for number, name in enumerate(whole.shards)}
    return LazyShards(made | (shards or {}), whole.fingerprint, whole.manifest, launch.of_shards("test", "cpu"))


def note_and_make(folder: Path, number: int) -> dict[str, torch.Tensor]:
    (folder / f"{number} by {os.getpid()}").touch()
    return make_shard(number)


def refuse(message: str):
    raise ValueError(message)


def note_and_wait(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def never_called(*_):
    raise AssertionError


def test_two_processes_share_the_shards_and_leave_the_bytes_of_one(tmp_path, dataset, folder, whole, caplog):
    (tmp_path / "notes").mkdir()
    thunks = {f"{number:05d}": partial(note_and_make, tmp_path / "notes", number) for number in range(NUM_SHARDS)}
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="dpdmd_pipeline.datasets.sharded"):
        dataset.save(made_by_two(thunks))
    makers = dict(sorted(path.name.split(" by ") for path in (tmp_path / "notes").iterdir()))
    first, second, *others = makers.values()
    assert first != second and others == [first, second] * 2 and str(os.getpid()) not in (first, second)
    # an earlier test in this process may have let torchelastic's own lines through
    told = [record.getMessage() for record in caplog.records if record.name == "dpdmd_pipeline.datasets.sharded"]
    assert told == [f"anchors: shard {n + 1} of 6 written ({ROWS[n]} rows)" for n in range(NUM_SHARDS)]
    assert contents(folder) == whole
    assert sorted(path.name for path in folder.parent.iterdir()) == [".anchors.lock", "anchors"]


def test_a_whole_cache_starts_no_process(dataset, caplog):
    dataset.save(lazy_shards())
    data = lazy_shards()
    with caplog.at_level(logging.INFO, logger="dpdmd_pipeline.datasets.sharded"):
        dataset.save(LazyShards(data.shards, data.fingerprint, data.manifest, never_called))
    assert caplog.messages[-1] == f"anchors: reused ({NUM_SHARDS} shards)"


def test_the_error_of_one_process_is_told_and_any_number_goes_on_from_what_is_finished(dataset, folder, whole):
    with pytest.raises(DatasetError) as caught:
        dataset.save(made_by_two({"00003": partial(refuse, "no such prompt")}))
    assert type(caught.value.__cause__) is ValueError and str(caught.value.__cause__) == "no such prompt"
    assert not dataset.exists()
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls in ([2, 3, 4, 5], [3, 4, 5])  # of the round in which one failed, the other may have finished
    assert contents(folder) == whole


WRITER = textwrap.dedent(
    """
    import signal, sys
    from functools import partial
    from pathlib import Path
    if __name__ == "__main__":
        sys.path.insert(0, sys.argv[3])
        from test_sharded import made_by_two, note_and_wait
        from dpdmd_pipeline.datasets.sharded import ShardedDataset
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as every run has it, by hooks.py
        waiting = {name: partial(note_and_wait, Path(sys.argv[2])) for name in ("00002", "00003")}
        try:
            ShardedDataset(filepath=sys.argv[1]).save(made_by_two(waiting))
        except KeyboardInterrupt:
            sys.exit(7)
    """
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_ended_by_a_signal_no_process_is_left_and_the_same_command_goes_on(tmp_path, dataset, folder, whole, number):
    (tmp_path / "writer.py").write_text(WRITER)
    (tmp_path / "notes").mkdir()
    command = [sys.executable, str(tmp_path / "writer.py"), str(folder), str(tmp_path / "notes")]
    more = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen([*command, str(Path(__file__).parent)], **more) as writer:
        until(lambda: len(list((tmp_path / "notes").iterdir())) == 2 or writer.poll() is not None)
        # a terminal's Ctrl-C goes to all of them
        os.killpg(writer.pid, number) if number == signal.SIGINT else writer.send_signal(number)
        _, said = writer.communicate(timeout=60)
    assert writer.returncode == (-number if number == signal.SIGKILL else 7), said
    assert not said or number == signal.SIGKILL  # then multiprocessing tidies up, and says so
    until(lambda: not any(Path("/proc", path.name).exists() for path in (tmp_path / "notes").iterdir()), seconds=10)
    calls: list[int] = []
    dataset.save(lazy_shards(calls=calls))
    assert calls == [2, 3, 4, 5]
    assert contents(folder) == whole


def until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def save_on_a_machine(folder: Path, rendezvous: str) -> None:
    ShardedDataset(filepath=str(folder)).save(made_by_two(machines=2, rendezvous=rendezvous))
    sys.exit(7)  # only the machine that has the first process goes on


def test_two_machines_write_one_cache_and_one_of_them_goes_on(folder, whole):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    context = get_context("spawn")
    machines = [context.Process(target=save_on_a_machine, args=(folder, f"127.0.0.1:{port}")) for _ in range(2)]
    for machine in machines:
        machine.start()
    for machine in machines:
        machine.join(120)
    assert sorted(machine.exitcode for machine in machines) == [0, 7]
    assert contents(folder) == whole


def test_what_another_machine_wrote_and_this_one_does_not_see_is_named_with_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(sharded, "_VISIBLE_WITHIN", 0.2)
    with pytest.raises(
        OSError, match="00001.safetensors, written by another machine, is not seen here: .* all machines"
    ):
        sharded._wait_until_seen(tmp_path / "00001.safetensors")


def test_what_is_held_is_loaded_once_a_key_and_stays_with_its_process():
    loads: list[str] = []
    held = LastLoaded(lambda key: loads.append(key) or [key])
    assert held("a") is held("a") and held("b") == ["b"] and held("a") == ["a"]
    assert loads == ["a", "b", "a"]
    held = LastLoaded(partial(make_shard, 0))
    held()
    assert len(pickle.dumps(held)) < 200
    assert torch.equal(pickle.loads(pickle.dumps(held))()["prompt"], held()["prompt"])
