"""Checkpoints of the embedded teachers and the CLIP are only resumed by the code that began them."""

from pathlib import Path

import pytest
from tests.test_dvc_sync import imported, module_file

from dpdmd_pipeline.pipelines.clip import nodes as clip
from dpdmd_pipeline.pipelines.teacher import nodes as teacher

PACKAGE = Path(teacher.__file__).parents[2]
# Reading and writing of states; recipes, whose numbers are part of the identity
IGNORED = {"publishing.py", "training/checkpoint.py", "training/sharding.py", "training/teacher_recipe.py"}
OF_TEACHERS_ALONE = {"dpdmd/noise.py", "shapes/models.py"}


@pytest.mark.parametrize(
    ("stage", "start", "ignored"),
    [
        (teacher, "training/teacher.py", IGNORED),
        (clip, "training/clip.py", {*IGNORED, *OF_TEACHERS_ALONE, "training/clip_recipe.py"}),
    ],
    ids=["teacher", "clip"],
)
def test_the_identity_of_a_training_covers_all_code_that_it_runs(stage, start, ignored):
    todo, files = [PACKAGE / start], set()
    while todo:
        path = todo.pop()
        if path not in files:
            files.add(path)
            todo += [file for name in imported(path) if (file := module_file(name))]
    assert {path.relative_to(PACKAGE).as_posix() for path in files} - ignored == set(stage.CODE)
