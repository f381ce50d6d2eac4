"""The sample stage on a tiny export."""

import numpy as np
import pytest
from tests.pipelines.conftest import backbone_options, export_tiny
from tests.raising import refuses

import dpdmd_pipeline
from dpdmd_pipeline.backbones.student_file import save_student
from dpdmd_pipeline.backbones.student_header import StudentHeader
from dpdmd_pipeline.datasets.picture_folder import PictureFolderDataset
from dpdmd_pipeline.pipelines.sample.nodes import draw_samples
from dpdmd_pipeline.pipelines.sample.options import SampleOptions
from dpdmd_pipeline.scoring.folders import find_pictures

OPTIONS = {
    "form": "diffusers",
    "prompts": ["a red circle", "A blue/green square!"],
    "seed": 5,
    "images_per_prompt": 3,
    "size": None,
    "batch_size": 4,
    "dtype": "float32",
    "device": "cpu",
    "teacher_start": None,
}


@pytest.fixture(scope="module")
def export(tiny_teacher, tmp_path_factory):
    student, folder = tmp_path_factory.mktemp("trained"), tmp_path_factory.mktemp("export")
    network = backbone_options().load(tiny_teacher, "cpu").load_model()
    save_student(student, network, StudentHeader("sd3", [1.0, 0.5, 0.0]))
    return export_tiny(student, tiny_teacher, 32, folder)


def draw(export, teacher, **changes):
    return draw_samples(export, teacher, SampleOptions(**OPTIONS | changes))


def saved(folder, pictures):
    """Sets that `score` finds in the folder of the catalog, and the other files."""
    dataset = PictureFolderDataset(filepath=str(folder / "samples"))
    dataset.save(pictures)
    return find_pictures(dataset.load())


def test_score_finds_the_prompts_and_seeds_of_the_stage_and_nothing_else(export, tiny_teacher, tmp_path):
    sets, rest = saved(tmp_path, draw(export, tiny_teacher)[0])
    assert not rest and {pictures.text for pictures in sets} == set(OPTIONS["prompts"])
    assert [[file.name for file in pictures.files] for pictures in sets] == 2 * [["5.png", "6.png", "7.png"]]
    assert all(not pictures.load().faults for pictures in sets)


def test_the_grid_has_a_row_per_prompt_and_a_column_per_seed(export, tiny_teacher):
    pictures, grid = draw(export, tiny_teacher)
    grid = np.asarray(grid)
    assert grid.shape == (2 * 32, 3 * 32, 3)
    for top, drawn in zip((0, 32), pictures.values(), strict=True):
        for start, picture in zip((0, 32, 64), drawn().values(), strict=True):
            assert np.array_equal(grid[top : top + 32, start : start + 32], np.asarray(picture))


def test_a_picture_is_that_of_the_packages_own_function(export, tiny_teacher):
    image = dpdmd_pipeline.sample(export / "diffusers", ["a red circle"], [6], device="cpu")[0]
    drawn = np.asarray(draw(export, tiny_teacher)[0]["a red circle"]()[6])
    assert np.abs(drawn.astype(int) - (image * 255).round().permute(1, 2, 0).numpy()).max() <= 1


def test_every_form_gives_the_same_pictures(export, tiny_teacher):
    first, second = (np.asarray(draw(export, tiny_teacher, form=form)[1]) for form in ("diffusers", "comfyui"))
    assert np.abs(first.astype(int) - second).max() <= 1


def test_a_form_that_was_not_exported_is_refused_with_the_exported_ones(export, tiny_teacher):
    with refuses(ValueError, "sample.form=lora:", "diffusers, comfyui"):
        draw(export, tiny_teacher, form="lora")


def test_the_teacher_of_the_run_can_start_every_form(export, tiny_teacher):
    start = {"teacher_start": {"steps": 2, "guidance_scale": 2.0}}
    alone = np.asarray(draw(export, tiny_teacher)[1])
    started = [np.asarray(draw(export, tiny_teacher, form=form, **start)[1]) for form in ("diffusers", "comfyui")]
    assert not np.array_equal(started[0], alone)
    assert np.abs(started[0].astype(int) - started[1]).max() <= 1
