"""The studies in conf can be trained: their runs are recipes, and their anchors lie on the teacher's schedule."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from kedro.config import OmegaConfigLoader

from dpdmd_pipeline.backbones.options import BackboneOptions
from dpdmd_pipeline.pipelines.anchors.nodes import make_manifest
from dpdmd_pipeline.pipelines.anchors.options import AnchorsOptions
from dpdmd_pipeline.pipelines.study import nodes
from dpdmd_pipeline.pipelines.study.options import StudyOptions
from dpdmd_pipeline.settings import CONFIG_LOADER_ARGS
from dpdmd_pipeline.training.options import TrainOptions

PROJECT = Path(__file__).parents[3]
EMBEDDINGS = SimpleNamespace(fingerprint="")


def configured(environment):
    return OmegaConfigLoader(str(PROJECT / "conf"), env=environment, **CONFIG_LOADER_ARGS)


@pytest.mark.parametrize("group", ["study", "beyond"])
@pytest.mark.parametrize("environment", ["base", "ci", "shapes_sdxl"])
def test_every_run_is_a_recipe_and_its_anchors_lie_on_the_teachers_schedule(environment, group):
    conf = configured(environment)
    parameters = conf["parameters"]
    teacher = PROJECT / conf["catalog"]["teacher"]["filepath"]
    backbone = BackboneOptions(**parameters["backbone"])
    anchors, train = AnchorsOptions(**parameters["anchors"]), TrainOptions(**parameters["train"])
    study = StudyOptions(**parameters[group])
    for name, run in study.kept.items():
        changed = nodes._changed(train, run.train)
        asked = nodes._changed(anchors, nodes._anchors_of(run))
        found = make_manifest([0], EMBEDDINGS, teacher, backbone, asked)
        assert len(found["anchor_steps"]) >= changed.anchored_steps, name


def test_in_the_ci_environment_a_study_takes_minutes():
    parameters = configured("ci")["parameters"]
    for group in ("study", "beyond"):
        study = StudyOptions(**parameters[group])
        turns = [
            study.kept[name].train.get("max_steps", parameters["train"]["max_steps"]) for _, name in study.students
        ]
        assert len(turns) < 15 and max(turns) < 10
