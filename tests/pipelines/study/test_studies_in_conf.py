"""The studies in conf have valid recipes, with anchors on the teacher's schedule."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.configuration import ConfigLoader
from dpdmd_pipeline.pipelines.anchors.nodes import make_manifest
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.planning.checks import changed_options
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import TrainOptions
from dpdmd_pipeline.training.recipe import AnchorRecipe

PROJECT = Path(__file__).parents[3]
EMBEDDINGS = SimpleNamespace(fingerprint="")


def configured(environment):
    return ConfigLoader(str(PROJECT / "conf"), env=environment, **CONFIG_LOADER_ARGS)


@pytest.mark.parametrize("group", ["study", "beyond", "variety"])
@pytest.mark.parametrize("environment", ["base", "ci", "shapes_sdxl"])
def test_every_run_is_a_recipe_with_anchors_on_the_teachers_schedule(environment, group):
    conf = configured(environment)
    parameters = conf["parameters"]
    teacher = PROJECT / conf["catalog"]["teacher"]["filepath"]
    backbone = BackboneOptions(**parameters["backbone"])
    anchors, train = AnchorRecipe(**parameters["anchors"]), TrainOptions(**parameters["train"])
    study = StudyOptions(**parameters[group])
    for name, run in study.active_runs.items():
        recipe, anchor_options = changed_options(train, anchors, run)
        manifest = make_manifest([0], EMBEDDINGS, teacher, backbone, anchor_options)
        assert len(manifest["anchor_steps"]) >= recipe.anchored_steps, name


def test_in_the_ci_environment_a_study_takes_minutes():
    parameters = configured("ci")["parameters"]
    default = parameters["train"]["max_steps"]
    for group in ("study", "beyond", "variety"):
        study = StudyOptions(**parameters[group])
        students = {json.dumps([seed, study.active_runs[name].train]) for seed, name in study.students}
        cycles = [json.loads(student)[1].get("max_steps", default) for student in students]
        assert len(cycles) < 15 and max(cycles) < 10
