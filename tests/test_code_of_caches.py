"""A cache is only taken up by the code that made it: all of that code, whichever family drew it."""

from pathlib import Path

import pytest
from tests.test_dvc_sync import imported, module_file

import dpdmd_pipeline
from dpdmd_pipeline.backbones import FAMILIES
from dpdmd_pipeline.pipelines.anchors import nodes as anchors
from dpdmd_pipeline.pipelines.evaluate import sampling
from dpdmd_pipeline.pipelines.prompts import nodes as prompts
from dpdmd_pipeline.pipelines.train import nodes as train

PACKAGE = Path(dpdmd_pipeline.__file__).parent
MODELS = ("backbones/", "dpdmd/", "exporting/", "training/")
# Names and options, whose values are in the identity, and which process computes: these move no number.
APART = {
    "backbones/__init__.py",
    "backbones/options.py",
    "training/launch.py",
    "training/launch_options.py",
    "training/member.py",
}


def closure(start: str) -> set[str]:
    """Files of the package that one of them runs."""
    todo, found = [PACKAGE / start], set()
    while todo:
        if (path := todo.pop()) not in found:
            found.add(path)
            todo += [file for name in imported(path) if (file := module_file(name))]
    return {path.relative_to(PACKAGE).as_posix() for path in found}


def named(code: tuple[str, ...]) -> set[str]:
    """Files that a tuple of files and folders names."""
    places = [PACKAGE / place for place in code]
    paths = [path for place in places for path in (place.rglob("*.py") if place.is_dir() else [place])]
    return {path.relative_to(PACKAGE).as_posix() for path in paths}


@pytest.mark.parametrize(
    ("start", "code", "of_students"),
    [
        ("training/anchors.py", anchors.CODE, {"backbones/lora.py", "backbones/student_file.py"}),
        ("pipelines/evaluate/sampling.py", sampling.CODE, set()),
    ],
)
def test_the_code_that_a_cache_is_known_by_is_all_that_computes_it(start, code, of_students):
    families = {f"backbones/{name}.py" for name in FAMILIES}
    used = {path for path in closure(start) if path.startswith(MODELS)}
    assert families < used  # the one that is asked for is named beside the others
    assert used - families - APART - of_students <= named(code)


@pytest.mark.parametrize("code", [anchors.CODE, prompts.CODE, sampling.CODE, train.CODE])
def test_what_is_named_is_there(code):
    assert [place for place in code if not (PACKAGE / place).exists()] == []
