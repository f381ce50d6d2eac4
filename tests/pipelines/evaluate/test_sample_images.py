"""Pictures depend on prompts, seeds, models and settings alone."""

import shutil
from itertools import groupby

import pytest
import torch
from kedro.io import DatasetError
from tests.pipelines.conftest import PROMPTS, TWO, backbone_options, cached, contents, evaluate_options
from tests.raising import refuses

from dpdmd_pipeline.backbones.student_file import save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.pipelines.evaluate.nodes import draw_grids, judged_prompts
from dpdmd_pipeline.pipelines.evaluate.sampling import image_seeds, sample_images, sample_model

CHOSEN = {0: "a red circle", 2: "a green triangle"}
SIGMAS = [1.0, 0.75, 0.5, 0.25, 0.0]


def load_network(tiny_teacher):
    return backbone_options().load(tiny_teacher, "cpu").load_model()


@pytest.fixture(scope="module")
def students(tiny_teacher, tmp_path_factory):
    """Two student folders: the teacher's own network, and the same network with two steps."""
    model = load_network(tiny_teacher)
    folders = [tmp_path_factory.mktemp(name) for name in ("dmd", "dp_dmd")]
    for folder, sigmas in zip(folders, (SIGMAS, [1.0, 0.5, 0.0]), strict=True):
        save_student(folder, model, StudentHeader("sd3", sigmas))
    return folders


@pytest.fixture
def sample(tiny_teacher, embeddings, students, tmp_path):
    """Function that draws pictures, with some options changed."""

    def sample_with(backbone=None, folders=None, **changes):
        shards = sample_images(
            CHOSEN,
            PROMPTS,
            embeddings,
            tiny_teacher,
            *(folders or students),
            backbone or backbone_options(),
            evaluate_options(**changes),
        )
        return cached(tmp_path / "images", shards)

    return sample_with


def by_model(images):
    """Yield all pictures of each model."""
    for _, shards in groupby(images.shards(), key=lambda shard: int(shard["model"][0])):
        of_model = list(shards)
        yield {name: torch.cat([shard[name] for shard in of_model]) for name in of_model[0]}


def test_all_models_draw_the_evaluation_prompts_from_the_same_seeds(sample):
    teacher, dmd, dp_dmd = by_model(sample())
    assert teacher["image"].shape == (6, 3, 32, 32) and teacher["image"].dtype == torch.uint8
    assert teacher["prompt"].tolist() == [0, 0, 0, 2, 2, 2]
    assert len(set(teacher["seed"].tolist())) == 6
    for number, shard in enumerate((teacher, dmd, dp_dmd)):
        assert shard["model"].tolist() == [number] * 6
        assert torch.equal(shard["seed"], teacher["seed"]) and torch.equal(shard["prompt"], teacher["prompt"])


def test_a_teacher_start_is_one_more_model_and_changes_no_other(sample, tmp_path):
    alone = sample()
    without = [shard["image"] for shard in by_model(alone)]
    shutil.rmtree(tmp_path / "images")
    images = sample(teacher_start={"steps": 2})
    *others, started = by_model(images)
    assert all(torch.equal(now["image"], before) for now, before in zip(others, without, strict=True))
    assert started["model"].tolist() == [3] * 6 and torch.equal(started["seed"], others[0]["seed"])
    assert not torch.equal(started["image"], others[1]["image"])
    guided = 2 if backbone_options().guidance_scale > 1 else 1
    assert images.manifest["nfe"]["dmd_start"] == 2 * guided + 3
    assert images.manifest["models"]["dmd_start"] == images.manifest["models"]["dmd"]
    assert images.fingerprint != alone.fingerprint


def test_on_a_cpu_batch_size_and_processes_do_not_change_a_bit_of_the_pictures(sample, tmp_path):
    whole = contents(sample())
    for changes in ({"batch_size": 1}, {"batch_size": 4}, {"launch": TWO}):
        shutil.rmtree(tmp_path / "images")
        assert contents(sample(**changes)) == whole


def test_several_shards_hold_the_same_pictures_as_one_call(sample, students, tiny_teacher, embeddings):
    options = evaluate_options(images_per_prompt=35)  # 70 pictures, 64 per shard
    inputs = CHOSEN, embeddings, tiny_teacher, backbone_options(num_steps=2), options
    images = sample(backbone_options(num_steps=2), images_per_prompt=35)
    assert [len(shard["seed"]) for shard in images.shards()] == [64, 6] * 3
    for folder, drawn in zip([None, *students], by_model(images), strict=True):
        expected = sample_model(folder, *inputs)
        assert all(torch.equal(drawn[name], tensor) for name, tensor in expected.items())


def test_more_pictures_start_with_the_same_seeds():
    few, many = (image_seeds(evaluate_options(images_per_prompt=count), "a") for count in (3, 9))
    assert many[:3] == few
    assert not set(few) & set(image_seeds(evaluate_options(), "b"))


def test_a_student_is_sampled_with_the_steps_of_its_file(sample, students, tiny_teacher, tmp_path):
    schedule = backbone_options().load(tiny_teacher, "cpu").schedule(5).sigma.tolist()
    like_teacher = tmp_path / "student"
    like_teacher.mkdir()
    save_student(like_teacher, load_network(tiny_teacher), StudentHeader("sd3", schedule))
    images = sample(backbone_options(num_steps=5, guidance_scale=1.0), [students[1], like_teacher])
    assert images.manifest["nfe"] == {"teacher": 5, "dmd": 2, "dp_dmd": 5}
    teacher, two_steps, student = (shard["image"].int() for shard in by_model(images))
    assert torch.equal(student, teacher) and not torch.equal(two_steps, teacher)


def test_without_guidance_a_teacher_step_is_one_evaluation(sample):
    assert sample(backbone_options(guidance_scale=1.0)).manifest["nfe"]["teacher"] == 6


def test_a_student_with_another_prediction_than_the_teacher_is_refused(sample, students, tiny_teacher, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    header = StudentHeader("sd3", prediction="v", timesteps=[999, 499])
    save_student(other, load_network(tiny_teacher), header)
    with refuses(DatasetError, "'v'", "'flow'"):
        sample(folders=[students[0], other])


def test_a_student_of_another_family_is_refused(sample, students, tiny_teacher, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    save_student(other, load_network(tiny_teacher), StudentHeader("sdxl", SIGMAS))
    with refuses(DatasetError, "'sdxl'", "'sd3'"):
        sample(folders=[other, students[1]])


def test_pictures_are_drawn_again_only_after_a_change_that_alters_them(students, tiny_teacher, embeddings, monkeypatch):
    def identity(backbone=None, folders=students, **changes):
        inputs = tiny_teacher, *folders, backbone or backbone_options(), evaluate_options(**changes)
        return sample_images(CHOSEN, PROMPTS, embeddings, *inputs).fingerprint

    first = identity()
    assert (
        first == identity(batch_size=1) == identity(grid_columns=5) == identity(device="auto") == identity(launch=TWO)
    )
    others = {identity(seed=1), identity(images_per_prompt=4), identity(backbone_options(guidance_scale=2.0))}
    others |= {identity(folders=students[::-1])}
    monkeypatch.setattr("dpdmd_pipeline.pipelines.evaluate.sampling.code_hash", lambda *paths: "of other code")
    assert len(others | {first, identity()}) == 6


def test_prompts_outside_the_judges_world_are_refused():
    with pytest.raises(ValueError, match=r"^1 prompt .*'a cat'"):
        judged_prompts([{"text": "a cat", "train": False, "eval": True}], evaluate_options())
    with refuses(ValueError, "raw_eval_prompts"):
        judged_prompts(PROMPTS[1:2], evaluate_options())
    assert judged_prompts(
        [{"text": "a cat", "train": False, "eval": True}], evaluate_options(judge=None, by=["diversity.pixels"])
    ) == {0: "a cat"}


def test_all_grids_show_a_row_per_prompt_and_the_same_columns(sample):
    grids = draw_grids(sample(), CHOSEN, evaluate_options())
    assert len(grids) == 3 and len({grid.size for grid in grids}) == 1
    assert grids[0].width == grids[0].height and grids[0].width % (2 * 33) == 0


def test_a_study_without_the_exact_reader_is_refused_before_it_trains():
    from dpdmd_pipeline.pipelines.study.nodes import run_study

    with refuses(ValueError, "evaluate.judge=None"):
        run_study(*[None] * 8, evaluate_options(judge=None, by=["diversity.pixels"]), None)
