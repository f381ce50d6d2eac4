"""The embedded teachers' and the CLIP's training is only taken up by the code that began it."""

from pathlib import Path

import pytest
from tests.test_dvc_sync import imported, module_file

from dpdmd_pipeline.pipelines.clip import nodes as clip
from dpdmd_pipeline.pipelines.teacher import nodes as teacher

PACKAGE = Path(teacher.__file__).parents[2]
# how a state is kept and taken up; recipes, whose numbers are in the name themselves
APART = {"publishing.py", "training/checkpoint.py", "training/sharding.py", "training/teacher_recipe.py"}
OF_TEACHERS_ALONE = {"dpdmd/noise.py", "shapes/models.py"}


@pytest.mark.parametrize(
    ("stage", "begins", "apart"),
    [
        (teacher, "training/teacher.py", APART),
        (clip, "training/clip.py", {*APART, *OF_TEACHERS_ALONE, "training/clip_recipe.py"}),
    ],
    ids=["teacher", "clip"],
)
def test_the_code_that_a_training_is_known_by_is_all_that_decides_it(stage, begins, apart):
    todo, found = [PACKAGE / begins], set()
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += [file for name in imported(path) if (file := module_file(name))]
    assert {path.relative_to(PACKAGE).as_posix() for path in found} - apart == set(stage.CODE)
