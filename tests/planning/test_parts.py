"""Refusals of a teacher's parts before the first node: files of other names, damaged files, tokenizers."""

import json
import shutil
from types import SimpleNamespace

import pytest
import transformers.utils
from kedro.io import DataCatalog, DatasetError, MemoryDataset
from safetensors.torch import load_file, save_file
from tests.raising import refuses

from dpdmd_pipeline.datasets.pretrained import PretrainedModelDataset
from dpdmd_pipeline.planning.checks import refuse_run
from dpdmd_pipeline.planning.parts import faulty_parts

NETWORKS = ("text_encoder", "text_encoder_2", "transformer", "vae")


@pytest.fixture
def teacher(world_teacher, tmp_path):
    """A copy of a whole teacher."""
    return shutil.copytree(world_teacher, tmp_path / "teacher")


def test_a_whole_teacher_has_no_faulty_part(world_teacher):
    assert [*faulty_parts(world_teacher, with_weights=True)] == []


@pytest.mark.parametrize("pickle_beside", [False, True])
@pytest.mark.parametrize("part", NETWORKS)
def test_a_part_that_exists_only_as_a_variant_is_named_with_its_file(teacher, part, pickle_beside):
    (weights,) = (teacher / part).glob("*.safetensors")
    variant = weights.rename(weights.with_name(f"{weights.stem}.fp16.safetensors"))
    if pickle_beside:
        weights.with_suffix(".bin").touch()
    (line,) = faulty_parts(teacher, with_weights=True)
    assert str(teacher / part) in line and weights.name in line and variant.name in line and "\n" not in line
    assert [*faulty_parts(teacher, with_weights=False)] == []
    with refuses(DatasetError, str(teacher / part), weights.name, variant.name):
        PretrainedModelDataset(model=str(teacher)).load()


@pytest.mark.parametrize("part", NETWORKS)
def test_a_part_without_some_weights_is_named_with_them(teacher, part, capfd):
    (path,) = (teacher / part).glob("*.safetensors")
    weights = load_file(path)
    missing = sorted(weights)[:2]
    save_file({name: value for name, value in weights.items() if name not in missing}, path, {"format": "pt"})
    (line,) = faulty_parts(teacher, with_weights=True)
    assert all(fact in line for fact in (str(teacher / part), "2", *missing)) and "\n" not in line
    assert capfd.readouterr().err == ""  # one line, without the libraries' warnings


@pytest.mark.parametrize("dataset", ["folder", "pretrained"])
def test_a_stage_that_reads_the_teacher_is_refused_before_its_first_node(teacher, dataset):
    (weights,) = (teacher / "vae").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-8])
    made = MemoryDataset(teacher) if dataset == "folder" else PretrainedModelDataset(model=str(teacher))
    catalog = DataCatalog({"teacher": made})
    export = SimpleNamespace(inputs=lambda: {"teacher"}, all_outputs=lambda: {"export"}, nodes=[])
    (line,) = refuse_run(export, catalog)
    assert str(weights) in line and "\n" not in line


def test_an_index_needs_all_its_files(teacher):
    (weights,) = (teacher / "transformer").glob("*.safetensors")
    shard = weights.rename(weights.with_name("shard-1.safetensors"))
    index = weights.with_name(f"{weights.name}.index.json")
    names = dict.fromkeys(load_file(shard), shard.name)
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert [*faulty_parts(teacher, with_weights=True)] == []
    index.write_text(json.dumps({"metadata": {}, "weight_map": {**names, "b": "shard-2.safetensors"}}))
    (line,) = faulty_parts(teacher, with_weights=True)
    assert "shard-2.safetensors" in line


@pytest.mark.parametrize("installed", [set(), {"sentencepiece"}, {"protobuf"}, {"sentencepiece", "protobuf"}])
def test_a_tokenizer_with_its_sentencepiece_model_alone_needs_two_packages(teacher, monkeypatch, installed):
    for package in ("sentencepiece", "protobuf"):
        monkeypatch.setattr(transformers.utils, f"is_{package}_available", lambda package=package: package in installed)
    folder = teacher / "tokenizer"
    (folder / "spiece.model").write_bytes(b"pieces")
    assert [*faulty_parts(teacher, with_weights=False)] == []  # its tokenizer.json is read
    (folder / "tokenizer.json").unlink()
    lines = [*faulty_parts(teacher, with_weights=False)]
    assert len(lines) == (len(installed) < 2)
    assert all(fact in line for line in lines for fact in (str(folder), "spiece.model", "sentencepiece protobuf"))
