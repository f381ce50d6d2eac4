import os
import shutil
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from kedro.io import DataCatalog, DatasetError
from tests.raising import refuses

from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset, ScratchFolderDataset, folder_hash
from dpdmd_pipeline.publishing import Folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / "student"


@pytest.fixture
def dataset(folder: Path) -> ModelFolderDataset:
    return ModelFolderDataset(filepath=str(folder))


def writer(text: str):
    def write(folder: Path) -> None:
        (folder / "model_index.json").write_text(text)
        (folder / "unet").mkdir()
        (folder / "unet" / "weights.safetensors").write_text(text)

    return write


def test_a_function_that_writes_a_folder_is_saved(dataset, folder):
    dataset.save(writer("one"))
    assert dataset.load() == folder
    assert (folder / "unet" / "weights.safetensors").read_text() == "one"
    assert sorted(path.name for path in folder.parent.iterdir()) == [".student.lock", "student"]


@pytest.fixture
def usual_umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("usual_umask")
def test_a_diffusers_model_is_saved_and_read_back_and_everybody_may_read_its_files(dataset):
    from diffusers import AutoencoderKL

    model = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    dataset.save(model)
    again = AutoencoderKL.from_pretrained(dataset.load())
    assert {stat.S_IMODE(path.stat().st_mode) for path in dataset.load().iterdir()} == {0o644}
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_a_second_model_replaces_all_of_the_first(dataset, folder):
    dataset.save(writer("one"))
    (folder / "stale.json").write_text("{}")
    dataset.save(writer("two"))
    assert (folder / "model_index.json").read_text() == "two"
    assert not (folder / "stale.json").exists()
    assert sorted(path.name for path in folder.parent.iterdir()) == [".student.lock", "student"]


def test_a_writer_that_fails_leaves_the_old_model(dataset, folder):
    dataset.save(writer("one"))

    def fail(partial: Path) -> None:
        (partial / "model_index.json").write_text("two")
        raise RuntimeError("out of memory")

    with refuses(DatasetError, "out of memory"):
        dataset.save(fail)
    assert (dataset.load() / "model_index.json").read_text() == "one"
    dataset.save(writer("three"))
    assert (dataset.load() / "model_index.json").read_text() == "three"


def test_killed_while_writing_the_old_model_stays_and_the_next_save_works(dataset, folder):
    dataset.save(writer("one"))
    code = textwrap.dedent(
        """
        import os, signal, sys
        from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset
        def write(folder):
            (folder / "model_index.json").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
        ModelFolderDataset(filepath=sys.argv[1]).save(write)
        """
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)]).returncode == -9
    assert (dataset.load() / "model_index.json").read_text() == "one"
    dataset.save(writer("two"))
    assert sorted(path.name for path in folder.parent.iterdir()) == [".student.lock", "student"]


@pytest.mark.parametrize("published_exists", [False, True])
def test_killed_while_publishing_a_whole_model_is_loaded(dataset, folder, published_exists):
    dataset.save(writer("new"))
    folder.rename(Folders.of(folder).ready)
    if published_exists:
        folder.mkdir()
        writer("old")(folder)
    assert dataset.exists()
    assert (dataset.load() / "model_index.json").read_text() == ("old" if published_exists else "new")


def test_a_missing_or_foreign_folder_names_the_path_and_the_remedy(dataset, folder):
    assert not dataset.exists()
    with refuses(DatasetError, f"{folder}", "run the stage") as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    folder.mkdir(parents=True)
    assert not dataset.exists()
    with refuses(DatasetError, f"{folder}", "model_index.json", "config.json", "run the stage") as caught:
        dataset.load()
    assert isinstance(caught.value.__cause__, FileNotFoundError)


def test_a_writer_without_a_model_and_a_dict_are_refused(dataset):
    with refuses(DatasetError, "<lambda>", "model_index.json", "config.json"):
        dataset.save(lambda folder: None)
    with refuses(DatasetError, "dict"):
        dataset.save({"weights": 1})
    assert not dataset.exists()


def test_a_model_too_big_for_the_disk_names_path_and_remedy_and_leaves_no_half(folder):
    code = textwrap.dedent(
        """
        import resource, sys
        import numpy
        from safetensors.numpy import save_file
        from dpdmd_pipeline.datasets.model_folder import ModelFolderDataset
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        try:
            weights = {"x": numpy.zeros(10**5)}
            ModelFolderDataset(filepath=sys.argv[1]).save(lambda folder: save_file(weights, folder / "x"))
        except Exception as error:
            print(type(error.__cause__).__name__, error.__cause__, sep="|")
        """
    )
    result = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    kind, text = result.stdout.strip().split("|")
    assert kind == "OSError"
    assert "File too large" in text and "file size limit" in text
    assert str(Folders.of(folder).partial) in text
    assert not Folders.of(folder).partial.exists()


def test_a_hash_depends_on_names_and_contents_and_not_on_path_or_time(tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    writer("one")(first)
    second = tmp_path / "second"
    shutil.copytree(first, second)
    os.utime(second / "model_index.json", (0, 0))
    (second / "README.md").write_text("not part of the model")
    assert folder_hash(first) == folder_hash(second)
    (second / "unet" / "weights.safetensors").write_text("two")
    changed = folder_hash(second)
    (second / "unet" / "weights.safetensors").rename(second / "weights.safetensors")
    assert len({folder_hash(first), changed, folder_hash(second)}) == 3


def test_a_hash_of_an_empty_folder_is_refused(tmp_path):
    with refuses(FileNotFoundError, str(tmp_path)):
        folder_hash(tmp_path)


def test_a_scratch_folder_is_created_by_loading_and_refuses_saving(tmp_path):
    dataset = ScratchFolderDataset(filepath=str(tmp_path / "a" / ".train_state"))
    assert dataset.exists()
    assert dataset.load().is_dir()
    assert dataset.load() == tmp_path / "a" / ".train_state"
    with refuses(DatasetError, "scratch"):
        dataset.save("anything")


def test_they_work_through_a_kedro_catalog(folder):
    module = "dpdmd_pipeline.datasets.model_folder"
    catalog = DataCatalog.from_config(
        {
            "student": {"type": f"{module}.ModelFolderDataset", "filepath": str(folder)},
            "train_state": {"type": f"{module}.ScratchFolderDataset", "filepath": str(folder.parent / ".train_state")},
        }
    )
    catalog.save("student", writer("one"))
    assert catalog.load("student") == folder
    assert catalog.load("train_state").is_dir()
