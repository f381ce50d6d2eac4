"""Every output of the catalog is replaced as a whole, with the mode of any new file, beside DVC's cache."""

import os
import stat
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest
import torch
from kedro.io import AbstractDataset, DatasetError
from kedro_datasets import json, matplotlib, pillow, text
from matplotlib.figure import Figure
from PIL import Image
from tests.raising import refuses

from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.datasets.sharded import LazyShards
from dpdmd_pipeline.datasets.whole_figure import MatplotlibDataset
from dpdmd_pipeline.datasets.whole_file import ImageDataset, JSONDataset, TextDataset
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS

CONF = Path(__file__).parents[2] / "conf"
CATALOG = ConfigLoader(str(CONF), env="ci", **CONFIG_LOADER_ARGS)["catalog"]
INPUTS = ("MemoryDataset", "FinishedModelDataset", "ScratchFolderDataset")  # types that nothing is saved to


def write_privately(folder: Path) -> None:
    """Write a model as libraries do that rename a temporary file of mode 0600."""
    descriptor, name = tempfile.mkstemp(dir=folder)
    os.write(descriptor, b"{}")
    os.close(descriptor)
    os.rename(name, folder / "config.json")


def sample(kind: str, number: int):
    """A value for a type of dataset; another for each number."""
    picture = Image.new("RGB", (2, 2), (number, 0, 0))
    match kind.rpartition(".")[2]:
        case "JSONDataset" | "OptionalJSONDataset":
            return {"number": number, "text": "é" * number}
        case "TextDataset":
            return f"text {number}\n"
        case "ImageDataset":
            return picture
        case "MatplotlibDataset":
            figure = Figure((1, 1))
            figure.subplots().plot([0, number])
            return figure
        case "PromptFileDataset":
            return [{"text": f"a cat {number}"}]
        case "ShardedDataset":
            return LazyShards({"0": lambda: {"x": torch.full((2, 3), number)}}, f"{number}", {})
        case "PictureFolderDataset":
            return {"a red circle": lambda: {0: picture}, "a cat / a dog": lambda: {0: picture}}
        case "ModelFolderDataset":
            return write_privately
    raise AssertionError(f"no sample for {kind}: add one")


OUTPUTS = [
    pytest.param(entry["type"], Path(entry["filepath"]).name, id=name)
    for name, entry in CATALOG.items()
    if not name.startswith("raw_") and entry["type"].rpartition(".")[2] not in INPUTS
]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o007, 0o660)], ids=["022", "007"])
@pytest.mark.parametrize(("kind", "name"), OUTPUTS)
def test_every_published_file_has_the_mode_of_any_new_file(tmp_path, kind, name, umask, mode):
    dataset = AbstractDataset.from_config(name, {"type": kind, "filepath": str(tmp_path / "new" / name)})
    before = os.umask(umask)
    try:
        dataset.save(sample(kind, 1))
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes and set(modes.values()) == {mode}, modes


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize(("kind", "name"), OUTPUTS)
def test_an_output_that_is_linked_into_the_cache_is_replaced_and_the_cache_keeps_its_content(
    tmp_path, kind, name, link
):
    target = tmp_path / "data" / name
    dataset = AbstractDataset.from_config(name, {"type": kind, "filepath": str(target)})
    dataset.save(sample(kind, 1))
    cached = {}
    files = [path for path in (target, *target.rglob("*")) if path.is_file()]
    for number, path in enumerate(files):  # as DVC does after a run
        cache = tmp_path / f"cache_{number}"
        path.rename(cache)
        cache.chmod(0o444)
        getattr(path, link)(cache)
        cached[cache] = cache.read_bytes()
    dataset.save(sample(kind, 2))
    assert {cache: cache.read_bytes() for cache in cached} == cached
    assert {stat.S_IMODE(cache.stat().st_mode) for cache in cached} == {0o444}
    new = [path for path in (target, *target.rglob("*")) if path.is_file()]
    assert new and not any(path.is_symlink() or path.samefile(cache) for path in new for cache in cached)
    assert "tmp" not in "".join(path.name for path in target.parent.iterdir())


ORIGINALS = [
    (JSONDataset, json.JSONDataset, "a.json"),
    (TextDataset, text.TextDataset, "a.html"),
    (ImageDataset, pillow.ImageDataset, "a.png"),
    (ImageDataset, pillow.ImageDataset, "a.jpg"),
    (MatplotlibDataset, matplotlib.MatplotlibDataset, "a.png"),
]


@pytest.mark.parametrize(("kind", "original", "name"), ORIGINALS)
def test_a_whole_file_has_the_bytes_of_kedros_own_dataset(tmp_path, kind, original, name):
    value = sample(original.__name__, 3)
    kind(filepath=str(tmp_path / "whole" / name)).save(value)
    original(filepath=str(tmp_path / "original" / name)).save(value)
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "original" / name).read_bytes()


def test_an_error_while_saving_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    dataset = JSONDataset(filepath=str(tmp_path / "a.json"))
    dataset.save({"number": 1})
    with refuses(DatasetError, "object"):
        dataset.save({"numbers": [1, 2], "no JSON": object()})
    assert dataset.load() == {"number": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_killed_while_saving_the_old_file_stays_and_the_next_save_leaves_nothing_beside_it(tmp_path):
    code = textwrap.dedent(
        """
        import os, signal, sys
        from dpdmd_pipeline.datasets.whole_file import JSONDataset
        kill = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        JSONDataset(filepath=sys.argv[1], save_args={"default": kill}).save({"rows": [0] * 100_000, "last": object()})
        """
    )
    dataset = JSONDataset(filepath=str(tmp_path / "a.json"))
    dataset.save({"number": 1})
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.json")]).returncode == -9
    assert dataset.load() == {"number": 1}
    dataset.save({"number": 2})
    assert dataset.load() == {"number": 2} and [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_an_error_of_the_system_names_the_file_and_a_remedy(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with refuses(DatasetError, str(tmp_path), "run the same command again") as error:
        TextDataset(filepath=str(tmp_path / "a.txt")).save("text")
    assert isinstance(error.value.__cause__, OSError)


def test_versions_are_saved_as_kedro_saves_them(tmp_path):
    entry = {"type": "dpdmd_pipeline.datasets.whole_file.JSONDataset", "filepath": str(tmp_path / "a.json")}
    dataset = AbstractDataset.from_config("a", entry | {"versioned": True})
    dataset.save({"number": 1})
    (version,) = (tmp_path / "a.json").iterdir()
    assert dataset.load() == {"number": 1} and [path.name for path in version.iterdir()] == ["a.json"]
