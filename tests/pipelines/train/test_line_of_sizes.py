"""The line at two picture sizes, one of them not square: anchors, training, resumption, export, pictures."""

import shutil
from collections import Counter
from itertools import permutations
from types import SimpleNamespace

import pytest
import torch
from comfy_nodes.header import read_header
from safetensors import safe_open
from safetensors.torch import load_file
from tests.pipelines.conftest import (
    ONE,
    PROMPTS,
    TWO,
    anchor_options,
    backbone_options,
    cached,
    contents,
    export_tiny,
    shared_by_two,
    train_options,
)
from tests.raising import refuses

from dpdmd_pipeline.backbones.networks import WEIGHTS
from dpdmd_pipeline.backbones.student_file import load_header
from dpdmd_pipeline.exporting.sample import sample
from dpdmd_pipeline.pipelines.anchors.nodes import make_anchors
from dpdmd_pipeline.pipelines.anchors.shards import load_teacher, samples_by_size
from dpdmd_pipeline.pipelines.train import nodes
from dpdmd_pipeline.training import distill
from dpdmd_pipeline.training.draws import size_of_cycle

SIZES = [[32, 32], [16, 48]]
SHAPES = [(16, 8, 8), (16, 4, 12)]  # of their latents
BACKBONE = backbone_options(resolution=SIZES)
ANCHORS = {"seeds_per_prompt": 3, "shard_size": 2}
RECIPE = {"max_steps": 4, "checkpoint_every": 2, "checkpoint_background": False, "fake_score_warmup": 2}


def make_cache(folder, teacher, embeddings, backbone=BACKBONE, **changes):
    options = anchor_options(**ANCHORS | changes)
    shards = make_anchors(PROMPTS, embeddings, teacher, backbone, options, train_options())
    return cached(folder, shared_by_two(shards) if shards.launch else shards)


@pytest.fixture(scope="module")
def sized_anchors(tiny_teacher, embeddings, tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("anchors"), tiny_teacher, embeddings)


# ---- anchors


def test_the_anchors_of_each_size_stack_and_reach_every_prompt(sized_anchors):
    assert sized_anchors.manifest["rows_by_size"] == [3, 3]
    for first, shape in zip((0, 3), SHAPES, strict=True):
        rows = sized_anchors.rows(range(first, first + 3))
        assert rows["anchor_0"].shape == (3, *shape)
        assert set(rows["prompt"].tolist()) == {0, 1}


def test_an_anchor_is_the_teachers_at_the_size_of_its_row(sized_anchors, tiny_teacher, embeddings):
    teacher = load_teacher(embeddings, tiny_teacher, BACKBONE, anchor_options(), [2])
    rows = sized_anchors.rows(range(3, 6))
    fresh = teacher.at((16, 48))(rows["prompt"].tolist(), rows["seed"].tolist())["anchor_0"]
    torch.testing.assert_close(rows["anchor_0"], fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("launch", [ONE, TWO])
def test_damaged_shards_are_made_again_to_the_same_bytes(sized_anchors, tiny_teacher, embeddings, tmp_path, launch):
    shutil.copytree(sized_anchors._folder, tmp_path / "anchors")
    names = sorted(path.name for path in (tmp_path / "anchors").glob("*.safetensors"))
    for name in (*names[:2], names[-1]):  # all of one size, and one of the other
        (tmp_path / "anchors" / name).write_bytes(b"")
    assert contents(make_cache(tmp_path / "anchors", tiny_teacher, embeddings, launch=launch)) == contents(
        sized_anchors
    )


@pytest.mark.parametrize("prompts, seeds, sizes", [(7, 3, 1), (7, 3, 3), (6, 3, 3), (2, 6, 3), (1, 5, 2), (9, 1, 4)])
def test_sizes_share_the_samples_evenly(prompts, seeds, sizes):
    rows = list(range(10, 10 + prompts))
    parts = samples_by_size(rows, sizes, seeds, 0)
    assert sorted(sum(parts, [])) == sorted(samples_by_size(rows, 1, seeds, 0)[0])
    assert max(map(len, parts)) - min(map(len, parts)) <= min(prompts, seeds)
    if seeds % sizes == 0:  # each prompt has each size equally often
        for part in parts:
            assert Counter(row for row, _ in part) == dict.fromkeys(rows, seeds // sizes)


def test_more_sizes_than_anchors_are_refused(tiny_teacher, embeddings, tmp_path):
    backbone = backbone_options(resolution=[[8, 8 * side] for side in range(1, 4)])
    with refuses(ValueError, "3 picture sizes", "2 prompts x 1 seeds", "anchors.seeds_per_prompt"):
        make_cache(tmp_path, tiny_teacher, embeddings, backbone, seeds_per_prompt=1)


# ---- the student


@pytest.fixture(scope="module", params=["cached", "online"])
def trained(request, sized_anchors, tiny_teacher, embeddings, tmp_path_factory):
    """Folder, function that trains, history of a student, and the shapes of its updates' samples."""
    folder, options = tmp_path_factory.mktemp("trained"), anchor_options(mode=request.param, **ANCHORS)
    cache = sized_anchors
    if request.param == "online":
        cache = make_cache(folder / "anchors", tiny_teacher, embeddings, mode="online")

    def train(states, name):
        write, history = nodes.train_student(
            PROMPTS, embeddings, cache, tiny_teacher, folder / states, None, BACKBONE, options, train_options(**RECIPE)
        )
        (folder / name).mkdir()
        write(folder / name)
        return history

    def copied(records):
        for record in records:
            if record["step"] == 3:  # a kill here would leave the checkpoint of cycle 2
                shutil.copytree(folder / "states", folder / "killed")
            yield record

    shapes, follow = {"x0": [], "noise": []}, nodes.follow
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nodes, "follow", lambda records, *rest: follow(copied(records), *rest))
        for function, name in ((distill.fake_score_update_loss, "x0"), (distill.follow_anchors, "noise")):
            patch.setattr(distill, function.__name__, spied(function, name, shapes[name]))
        history = train("states", "student")
    return SimpleNamespace(folder=folder, train=train, history=history, shapes=shapes)


def spied(function, name, shapes):
    """The function, which also notes the shape of an argument's samples."""

    def call(*args, **arguments):
        shapes.append(tuple(arguments[name].shape[1:]))
        return function(*args, **arguments)

    return call


def test_the_updates_of_a_cycle_have_one_size_and_all_sizes_as_many_cycles(trained):
    warmup, cycles = trained.shapes["x0"][:2], trained.shapes["x0"][2:]
    assert cycles == trained.shapes["noise"]
    assert Counter(warmup) == dict.fromkeys(SHAPES, 1) and Counter(cycles) == dict.fromkeys(SHAPES, 2)
    assert all(row["diversity_loss"] > 0 for row in trained.history)


def test_a_killed_run_resumes_bit_for_bit(trained):
    assert trained.train("killed", "resumed") == trained.history
    whole, resumed = (load_file(trained.folder / name / WEIGHTS) for name in ("student", "resumed"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_every_few_cycles_have_each_size_once_in_random_order(sizes):
    orders = {tuple(size_of_cycle(7, sizes * turn + place, sizes) for place in range(sizes)) for turn in range(60)}
    assert orders == set(permutations(range(sizes)))


# ---- the export

FROM_A_CACHE = pytest.mark.parametrize("trained", ["cached"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def exported(trained, tiny_teacher):
    return export_tiny(trained.folder / "student", tiny_teacher, SIZES, trained.folder / "export")


@FROM_A_CACHE
def test_headers_and_card_name_the_sizes(exported, trained):
    assert load_header(trained.folder / "student").sizes == [(32, 32), (16, 48)]
    with safe_open(exported / "comfyui" / "tiny.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["dpdmd.resolution"] == str(SIZES) and metadata["modelspec.resolution"] == "32x32"
    assert len(read_header(metadata, "x").sigmas) == 5  # the ComfyUI pack reads it
    assert "32 x 32, 16 x 48" in (exported / "README.md").read_text()


@FROM_A_CACHE
@pytest.mark.parametrize("size", [(32, 32), (16, 48), (48, 32)])
def test_the_export_draws_at_each_size_and_at_others_with_a_line(exported, tiny_teacher, caplog, size):
    pictures = sample(exported / "diffusers", ["a red circle"], [5], device="cpu", size=size)
    assert pictures.shape == (1, 3, *size)
    assert ("not at 48 x 32" in caplog.text) == (size == (48, 32))
    from_file = sample(
        exported / "comfyui" / "tiny.safetensors", ["a red circle"], [5], teacher=tiny_teacher, device="cpu", size=size
    )
    torch.testing.assert_close(from_file, pictures, rtol=1e-4, atol=1e-4)


@FROM_A_CACHE
def test_the_first_size_is_the_default_and_sizes_that_no_patch_divides_are_refused(exported):
    file, arguments = exported / "diffusers", {"prompts": ["a red circle"], "seeds": [5], "device": "cpu"}
    assert sample(file, **arguments).shape == (1, 3, 32, 32)
    with refuses(ValueError, "size 30 x 32", "multiples of 8", "32 x 32"):
        sample(file, **arguments, size=(30, 32))
